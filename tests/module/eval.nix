# The module evaluated without nixpkgs, on a machine with Debian's Nix. tests/module.rs asks for its parts.
let
  lib = import ./lib.nix;
  evaluateWith =
    packages: nix: modules:
    lib.evalModules {
      modules = [ ./debian.nix ] ++ modules;
      args.pkgs = packages // {
        inherit nix;
        pkgsStatic.busybox = "/usr";
      };
      # As nixos/lib/utils.nix: a JSON string is a quoted word of systemd.service(5), with specifiers (%) and variables
      # ($) doubled.
      args.utils.escapeSystemdExecArgs =
        arguments:
        builtins.concatStringsSep " " (
          map (one: builtins.replaceStrings [ "%" "$" ] [ "%%" "$$" ] (builtins.toJSON (toString one))) arguments
        );
    };
  # Where a program installed by hand is.
  evaluate = evaluateWith { peerix = "/usr/local"; };
  machine =
    nix: modules:
    let
      inherit (evaluate nix modules) config;
      variant = { configuration }: import ./render.nix (evaluate nix (modules ++ [ configuration ])).config;
    in
    import ./render.nix config // { specialisation = builtins.mapAttrs (_: variant) (config.specialisation or { }); };
in
{
  # The configuration that a module comes to, as files. Nix is where its own installer puts it.
  module = module: machine "/nix/var/nix/profiles/default" [ ../../nixos-module.nix module ];

  # The same with two copies of the module, as of a flake and of a tarball.
  twice =
    module:
    machine "/nix/var/nix/profiles/default" [
      ../../nixos-module.nix
      (import ../../nixos-module.nix)
      module
    ];

  # The package that is taken where nixpkgs has none, of one that "builds" a file by naming it.
  fallback =
    (evaluateWith { callPackage = file: _: file; } "/usr" [ ../../nixos-module.nix ])
    .options.services.peerix.package.default;

  # Name, type, default and description of every option.
  options =
    let
      list =
        prefix: options:
        builtins.concatMap (
          name:
          let
            option = options.${name};
          in
          if option._type or null == "option" then
            [
              {
                name = "${prefix}.${name}";
                type = option.type.name;
                inherit (option) default description;
              }
            ]
          else
            list "${prefix}.${name}" option
        ) (builtins.attrNames options);
    in
    list "services" (evaluate "/usr" [ ../../nixos-module.nix ]).options.services;

  # The machines of a test in nix/tests. Nix is Debian's.
  machines = test: builtins.mapAttrs (_: node: machine "/usr" [ node ]) (import test { peerix = "/usr/local"; }).nodes;
}
