# What the machines of the demonstration have in their stores. Built without a sandbox by /bin/sh.
let
  build = name: script: inputs: derivation {
    inherit name inputs;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-ec" script ];
    PATH = "/usr/bin:/bin";
  };
  # A path that refers to `count - 1` others, which refer to one another.
  closure = name: count:
    let
      part = i: build "${name}-${toString i}"
        "mkdir $out; echo $inputs > $out/inputs; seq ${toString (i * 100)} > $out/data"
        (if i < 5 then [ ] else [ (part (i - 5)) (part (i / 2)) ]);
    in build name "mkdir $out; echo $inputs > $out/inputs" (builtins.genList part (count - 1));
in
{
  editor = closure "editor" 60;
  shell = closure "shell" 40;
  # The same wherever it is built.
  image = build "image" "mkdir $out; yes peerix | head -c 268435456 > $out/disk" [ ];
  # This too; it can be made several times smaller, but not to nothing.
  book = build "book" "mkdir $out; seq 100000000 | head -c 268435456 > $out/text" [ ];
}
