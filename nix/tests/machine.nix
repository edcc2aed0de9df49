# What all machines of the tests have: peerix by its module, an ordinary user, something to build, and no network but
# that of the test.
peerix:
{ lib, pkgs, ... }:
{
  imports = [ ../../nixos-module.nix ];

  services.peerix = {
    enable = lib.mkDefault true;
    package = peerix;
  };

  nix.settings = {
    substituters = lib.mkForce [ ];
    # What one machine lacks now another may have in a moment.
    narinfo-cache-negative-ttl = 0;
  };

  users.users.alice.isNormalUser = true;
  virtualisation.memorySize = 1024;

  environment.etc = {
    # Builders are static, as there is nothing else in these stores.
    "peerix-test/busybox".source = "${pkgs.pkgsStatic.busybox}/bin/busybox";
    "peerix-test/paths.nix".source = ./paths.nix;
  };
}
