# What NixOS makes of a configuration, as far as peerix's machines need it: text of unit files, nix.conf, ports.
# The sections and their order are those of nixpkgs' nixos/lib/systemd-lib.nix.
config:
let
  inherit (builtins)
    attrNames
    concatLists
    concatMap
    concatStringsSep
    filter
    isBool
    isList
    listToAttrs
    mapAttrs
    toString
    ;

  word = value: if isBool value then (if value then "true" else "false") else toString value;
  lines = set: concatMap (name: map (value: "${name}=${word value}") (asList set.${name})) (attrNames set);
  asList = value: if isList value then value else [ value ];
  section = name: set: if set == { } then "" else concatStringsSep "\n" ([ "[${name}]" ] ++ lines set) + "\n";

  listed = name: values: if values == [ ] then { } else { ${name} = concatStringsSep " " values; };
  unitSection =
    unit:
    listed "After" (unit.after or [ ])
    // listed "Before" (unit.before or [ ])
    // (if unit ? description then { Description = unit.description; } else { })
    // listed "Documentation" (unit.documentation or [ ])
    // listed "PartOf" (unit.partOf or [ ])
    // listed "Requires" (unit.requires or [ ])
    // (if unit ? startLimitBurst then { StartLimitBurst = unit.startLimitBurst; } else { })
    // (if unit ? startLimitIntervalSec then { StartLimitIntervalSec = unit.startLimitIntervalSec; } else { })
    // listed "Wants" (unit.wants or [ ]);

  # nixpkgs makes a file of the script; where it lies is for the machine to say.
  serviceSection =
    name: unit:
    (unit.serviceConfig or { }) // (if unit ? script then { ExecStart = "/etc/peerix-scripts/${name}"; } else { });

  text =
    sections: unit:
    concatStringsSep "\n" (
      filter (text: text != "") (
        sections
        ++ [ (section "Install" (listed "WantedBy" (unit.wantedBy or [ ]))) ]
      )
    );

  services = config.systemd.services or { };
  sockets = config.systemd.sockets or { };
  paths = config.systemd.paths or { };
  # Others, as nix-daemon's, exist already and get something added.
  ours = filter (name: services.${name} ? description) (attrNames services);
  named = names: make: listToAttrs (map make names);
  settings = config.nix.settings or { };
  firewall = config.networking.firewall or { };
in
{
  units =
    named ours (name: {
      name = "${name}.service";
      value = text [
        (section "Unit" (unitSection services.${name}))
        (section "Service" (serviceSection name services.${name}))
      ] services.${name};
    })
    // named (attrNames sockets) (name: {
      name = "${name}.socket";
      value = text [
        (section "Unit" (unitSection sockets.${name}))
        (section "Socket" sockets.${name}.socketConfig)
      ] sockets.${name};
    })
    // named (attrNames paths) (name: {
      name = "${name}.path";
      value = text [
        (section "Unit" (unitSection paths.${name}))
        (section "Path" paths.${name}.pathConfig)
      ] paths.${name};
    });

  scripts = named (filter (name: services.${name} ? script) ours) (name: {
    inherit name;
    value = "#!/bin/bash\nset -e\n\n${services.${name}.script}";
  });

  # As nixpkgs orders them: settings that add to others come after those.
  nixConf =
    let
      isExtra = name: builtins.substring 0 6 name == "extra-";
      line = name: "${name} = ${if isList settings.${name} then toString settings.${name} else word settings.${name}}";
      part = wanted: map line (filter (name: isExtra name == wanted) (attrNames settings));
    in
    concatStringsSep "\n" (part false ++ part true ++ [ (config.nix.extraOptions or "") ]);

  tcp = firewall.allowedTCPPorts or [ ];
  udp = firewall.allowedUDPPorts or [ ];
  failed = map (assertion: assertion.message) (
    filter (assertion: !assertion.assertion) (config.assertions or [ ])
  );
  warnings = config.warnings or [ ];
  noProxy = config.networking.proxy.noProxy or null;
  tmpfiles = config.systemd.tmpfiles.rules or [ ];
  users = attrNames (config.users.users or { });
  # Each with `text` or the `source` it is a copy of.
  etc = mapAttrs (
    _: file:
    { mode = file.mode or "0644"; }
    // (if file ? text then { inherit (file) text; } else { source = toString file.source; })
  ) (config.environment.etc or { });
  vlans = config.virtualisation.vlans or [ ];
  memory = config.virtualisation.memorySize or 1024;
  restartTriggers = mapAttrs (_: unit: map toString (unit.restartTriggers or [ ])) services;
  stopIfChanged = mapAttrs (_: unit: unit.stopIfChanged or true) services;
}
