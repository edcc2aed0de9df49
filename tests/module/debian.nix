# A machine whose Nix came with Debian, as a module: what NixOS itself sets and peerix's module reads.
{ lib, pkgs, ... }:
{
  # On Debian not everybody may ask nix-daemon.
  systemd.services.peerix.serviceConfig = lib.mkIf (pkgs.nix == "/usr") { SupplementaryGroups = "nix-users"; };

  # Lists that are there when nothing adds to them.
  assertions = [ ];
  networking.firewall = {
    allowedTCPPorts = [ ];
    allowedUDPPorts = [ ];
  };
  systemd.tmpfiles.rules = [ ];

  nix.package = pkgs.nix;
  nix.settings = {
    build-users-group = "nixbld";
    require-sigs = true;
    substituters = [ "https://cache.nixos.org/" ];
    trusted-public-keys = [ "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=" ];
  };
}
