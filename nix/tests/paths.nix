# Store paths for the tests. `name` tells them apart, `size` is in KiB; it refers to `count` others, of `size` too.
{
  shell,
  name,
  size ? 4,
  count ? 0,
}:
let
  tools = builtins.storePath shell;
  path =
    name: references:
    derivation {
      inherit name references;
      system = builtins.currentSystem;
      PATH = tools;
      builder = "${tools}/sh";
      args = [
        "-ec"
        ''
          mkdir $out
          echo $name $references > $out/text
          head -c ${toString size}k /dev/zero > $out/zeros
        ''
      ];
    };
in
path name (builtins.genList (number: path "${name}-${toString number}" [ ]) count)
