# A machine whose Nix came with Debian, as a module: what NixOS itself sets and peerix's module reads.
{ lib, pkgs, ... }:
{
  # What the module asks for before it defines it.
  options.networking.proxy = builtins.listToAttrs (
    map
      (name: {
        inherit name;
        value = lib.mkOption {
          type = lib.types.nullOr lib.types.str;
          default = null;
        };
      })
      [
        "default"
        "httpProxy"
        "allProxy"
        "noProxy"
      ]
  );

  config = {
    # On Debian not everybody may ask nix-daemon.
    systemd.services.peerix.serviceConfig = lib.mkIf (pkgs.nix == "/usr") { SupplementaryGroups = "nix-users"; };

    # Lists that are there when nothing adds to them.
    assertions = [ ];
    networking.firewall = {
      allowedTCPPorts = [ ];
      allowedUDPPorts = [ ];
    };
    systemd.tmpfiles.rules = [ ];
    systemd.package = "/usr";
    warnings = [ ];

    nix.package = pkgs.nix;
    nix.settings = {
      build-users-group = "nixbld";
      require-sigs = true;
      substituters = [ "https://cache.nixos.org/" ];
      trusted-public-keys = [ "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=" ];
    };
  };
}
