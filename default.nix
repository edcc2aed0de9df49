# For those without flakes: `nix-build` makes the package, and
#
#     imports = [ "${builtins.fetchTarball "https://github.com/sophronesis/peerix/archive/main.tar.gz"}/nixos-module.nix" ];
#
# in a NixOS configuration is the module, which builds the package with that system's own nixpkgs.
{
  pkgs ? import <nixpkgs> { },
}:
pkgs.callPackage ./nix/package.nix { }
