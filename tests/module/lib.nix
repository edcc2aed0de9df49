# What nixos-module.nix uses of nixpkgs' `lib`, written for these tests: enough of the module system to evaluate the
# module where there is no nixpkgs. Only its own options are declared; other options (`systemd`, `nix`, ...) are
# taken as they come, merged as NixOS merges them: sets by name, lists one after the other, else all equal.
let
  inherit (builtins)
    all
    attrNames
    concatMap
    concatLists
    concatStringsSep
    elem
    elemAt
    filter
    foldl'
    functionArgs
    genList
    head
    isAttrs
    isBool
    isFunction
    isInt
    isList
    isPath
    isString
    length
    listToAttrs
    mapAttrs
    replaceStrings
    stringLength
    substring
    typeOf
    ;
in
rec {
  optional = condition: value: if condition then [ value ] else [ ];
  optionals = condition: list: if condition then list else [ ];
  optionalString = condition: text: if condition then text else "";
  optionalAttrs = condition: set: if condition then set else { };
  toList = value: if isList value then value else [ value ];
  unique = foldl' (seen: value: if elem value seen then seen else seen ++ [ value ]) [ ];
  inherit concatMap concatLists;
  mapAttrsToList = make: set: map (name: make name set.${name}) (attrNames set);
  hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
  removePrefix = prefix: text: substring (stringLength prefix) (stringLength text) text;
  escape = chars: replaceStrings chars (map (char: "\\${char}") chars);
  inherit concatStringsSep;
  # Without the end of its last line.
  fileContents =
    path:
    let
      text = builtins.readFile path;
      last = stringLength text - 1;
    in
    if last >= 0 && substring last 1 text == "\n" then substring 0 last text else text;
  literalExpression = text: { inherit text; };

  # Definitions with a condition, several in one, and with a priority (the lowest number counts).
  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkMerge = contents: {
    _type = "merge";
    inherit contents;
  };
  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };
  mkDefault = mkOverride 1000;
  mkForce = mkOverride 50;

  mkOption = attrs: attrs // { _type = "option"; };
  mkPackageOption =
    packages: name: { }:
    mkOption {
      type = types.package;
      default = packages.${name};
      defaultText = literalExpression "pkgs.${name}";
      description = "The ${name} package to use.";
    };
  mkEnableOption =
    what:
    mkOption {
      type = types.bool;
      default = false;
      description = "Whether to enable ${what}.";
    };

  types =
    let
      simple = name: check: { inherit name check; };
    in
    rec {
      bool = simple "bool" isBool;
      int = simple "int" isInt;
      str = simple "str" isString;
      lines = str // {
        merge = concatStringsSep "\n";
      };
      path = simple "path" (value: isPath value || isString value && substring 0 1 value == "/");
      package = simple "package" (value: value.type or null == "derivation" || path.check value);
      port = simple "port" (value: isInt value && value >= 0 && value <= 65535);
      ints.unsigned = simple "ints.unsigned" (value: isInt value && value >= 0);
      enum = values: simple "enum ${builtins.toJSON values}" (value: elem value values);
      nullOr = type: simple "nullOr ${type.name}" (value: value == null || type.check value);
      either = one: other: simple "either ${one.name} ${other.name}" (value: one.check value || other.check value);
      oneOf = types: {
        name = "oneOf";
        check = value: builtins.any (type: type.check value) types;
      };
      # What stands for one name is merged as elsewhere; its type is checked then.
      attrsOf = type: {
        name = "attrsOf ${type.name}";
        check = isAttrs;
        merge =
          sets:
          mapAttrs (
            name: value: if type.check value then value else throw "${name}: ${builtins.toJSON value} is not of type ${type.name}"
          ) (mergeAny "settings" (concatMap pushDown sets));
      };
      listOf = type: {
        name = "listOf ${type.name}";
        check = value: isList value && all type.check value;
        merge = concatLists;
      };
    };

  # Moves conditions from sets to their values, so that the names of what is defined never hang on what is defined.
  pushDown =
    value:
    if value._type or null == "merge" then
      concatMap pushDown value.contents
    else if value._type or null == "if" then
      map (mapAttrs (_: mkIf value.condition)) (pushDown value.content)
    else
      [ value ];

  # All that is defined with the best priority.
  discharge =
    values:
    let
      flat =
        priority: value:
        if value._type or null == "merge" then
          concatMap (flat priority) value.contents
        else if value._type or null == "if" then
          optionals value.condition (flat priority value.content)
        else if value._type or null == "override" then
          flat value.priority value.content
        else
          [ { inherit priority value; } ];
      found = concatMap (flat 100) values;
      best = foldl' (least: one: if one.priority < least then one.priority else least) 9999 found;
    in
    map (one: one.value) (filter (one: one.priority == best) found);

  # What options that are not declared here come to.
  mergeAny =
    where: values:
    let
      plain = discharge values;
      first = head plain;
      isSet = value: isAttrs value && !(value ? type) || value == { };
    in
    if all isSet plain then
      mapAttrs (name: mergeAny "${where}.${name}") (collect plain)
    else if all isList plain then
      concatLists plain
    else if all (value: value == first) plain then
      first
    else
      throw "${where}: defined in ways that do not go together: ${concatStringsSep ", " (map typeOf plain)}";

  # { a = 1; } and { a = 2; b = 3; } are { a = [ 1 2 ]; b = [ 3 ]; }.
  collect =
    sets:
    foldl' (
      all: set: all // mapAttrs (name: value: (all.${name} or [ ]) ++ [ value ]) (absentLeftOut set)
    ) { } sets;

  # Names whose only definitions have a condition that does not hold are not there.
  absentLeftOut =
    set:
    listToAttrs (
      concatMap (name: optional (discharge [ set.${name} ] != [ ]) { inherit name; value = set.${name}; }) (attrNames set)
    );

  mergeOption =
    where: option: values:
    let
      plain = discharge values;
      bad = filter (value: !option.type.check value) plain;
    in
    if plain == [ ] then
      option.default or (throw "${where}: is not set and has no default")
    else if bad != [ ] then
      throw "${where}: ${builtins.toJSON (head bad)} is not of type ${option.type.name}"
    else if option.type ? merge then
      option.type.merge plain
    else if all (value: value == head plain) plain then
      head plain
    else
      throw "${where}: is set twice";

  mergeDeclared =
    where: options: sets:
    let
      pushed = concatMap pushDown sets;
      definitions = name: concatMap (set: optional (set ? ${name}) set.${name}) pushed;
      named = concatMap attrNames pushed;
      here = name: if where == "" then name else "${where}.${name}";
      unknown = name: if elem where [ "" "services" "networking" ] then mergeAny (here name) (definitions name) else throw "${here name}: no such option";
    in
    mapAttrs (
      name: option:
      if option._type or null == "option" then
        mergeOption (here name) option (definitions name)
      else
        mergeDeclared (here name) option (definitions name)
    ) options
    // listToAttrs (
      map (name: {
        inherit name;
        value = unknown name;
      }) (filter (name: !(options ? ${name})) (unique named))
    );

  # The configuration that modules come to; `options` are those of modules that declare any.
  evalModules =
    { modules, args }:
    let
      config = mergeDeclared "" options (map (module: module.config) loaded);
      options = foldl' (all: module: all // module.options) { } loaded;
      load =
        module:
        let
          value = if isFunction module then module (args // { inherit config; lib = import ./lib.nix; }) else module;
        in
        if isPath module || isString module then
          load (import module)
        else
          concatMap load (value.imports or [ ])
          ++ [
            {
              key = value.key or null;
              options = value.options or { };
              config =
                if value ? options || value ? config then value.config or { } else removeAttrs value [ "imports" ];
            }
          ];
      # A module is known by its key, else it is another one.
      loaded = foldl' (
        seen: module:
        if module.key != null && elem module.key (map (one: one.key) seen) then seen else seen ++ [ module ]
      ) [ ] (concatMap load modules);
    in
    {
      inherit config options;
    };
}
