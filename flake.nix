{
  description = "Peer-to-peer binary cache for Nix: fetch store paths from the machines around you";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      forEachSystem = make: lib.genAttrs systems (system: make nixpkgs.legacyPackages.${system});
    in
    {
      nixosModules = {
        # With the package of this flake, which is tested with it.
        peerix =
          { pkgs, ... }:
          {
            # Imported twice, as by two modules that need it, it is one.
            key = "github:sophronesis/peerix#nixosModules.peerix";
            imports = [ ./nixos-module.nix ];
            services.peerix.package = lib.mkDefault self.packages.${pkgs.stdenv.hostPlatform.system}.peerix;
          };
        default = self.nixosModules.peerix;
      };

      overlays.default = final: _previous: { peerix = final.callPackage ./nix/package.nix { }; };

      packages = forEachSystem (pkgs: rec {
        peerix = pkgs.callPackage ./nix/package.nix { };
        default = peerix;
      });

      apps = forEachSystem (
        pkgs:
        let
          app = program: {
            type = "app";
            program = "${self.packages.${pkgs.stdenv.hostPlatform.system}.peerix}/bin/${program}";
            meta.description = self.packages.${pkgs.stdenv.hostPlatform.system}.peerix.meta.description;
          };
        in
        rec {
          peerix = app "peerix";
          peerix-tracker = app "peerix-tracker";
          default = peerix;
        }
      );

      devShells = forEachSystem (pkgs: {
        default = pkgs.mkShell {
          inputsFrom = [ self.packages.${pkgs.stdenv.hostPlatform.system}.peerix ];
          packages = with pkgs; [
            clippy
            rustfmt
            rust-analyzer
          ];
        };
      });

      # The package with its own tests, and the module in virtual machines.
      checks = forEachSystem (
        pkgs:
        let
          inherit (self.packages.${pkgs.stdenv.hostPlatform.system}) peerix;
        in
        { inherit peerix; } // peerix.tests
      );
    };
}
