# Store paths for the tests. Built without a sandbox by /bin/sh; `salt` keeps them from being anyone else's.
{ salt }:
let
  build = name: script: inputs: derivation {
    inherit name inputs salt;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-ec" script ];
    PATH = "/usr/bin:/bin";
  };

  # Layers of 50: each node of a full layer refers to four of the layer below, and each is referred to.
  width = 50;
  small = "mkdir $out $out/bin; echo $inputs > $out/inputs; seq $size > $out/data; echo exit > $out/bin/run; chmod +x $out/bin/run";
  node = i:
    let
      below = i - (i - width * (i / width)) - width;
      pick = k: let j = i + k * k * 7; in builtins.elemAt nodes (below + (j - width * (j / width)));
      refs = if below < 0 then [ ] else [ (pick 0) (pick 1) (pick 2) (pick 3) ];
      size = 1 + 61 * (i - 97 * (i / 97));
    in build "node-${toString i}" "size=${toString size}; ${small}" refs;
  nodes = builtins.genList node 1000;

  # Everything in the nodes below n - 1, and itself: a closure of exactly n paths.
  root = n:
    let
      last = n - 1;
      from = (last / width - 1) * width;
    in build "root-${toString n}" "size=1; ${small}" (builtins.genList (k: builtins.elemAt nodes (from + k)) (last - from));
in
{
  closure300 = root 300;
  closure1000 = root 1000;
  big = build "big" "head -c 536870912 /dev/urandom > $out" [ ];
  middle = build "middle" "mkdir $out; head -c 67108864 /dev/urandom > $out/data; echo end > $out/zzz" [ ];
  many = build "many" ''
    mkdir $out; cd $out
    d=0
    while [ $d -lt 200 ]; do
      mkdir $d
      f=0
      while [ $f -lt 100 ]; do echo "$d $f $salt" > $d/$f; f=$((f + 1)); done
      d=$((d + 1))
    done
  '' [ ];
  odd = build "odd" ''
    mkdir $out; cd $out
    echo a > "$(printf 'new\nline')"
    echo b > "$(printf 'byte\377')"
    echo c > "quotes\"'\`"
    echo d > "$(printf '%0255d' 7)"
    echo e > '100%'; echo e2 > '%2e%2e'; echo e3 > '%s%n'
    echo f > ' space '; echo g > -rf; echo h > ...; echo i > '\'; echo j > '*?[x]'
    echo k > ümlaut; echo l > "$(printf 'tab\tbell\007')"
    printf '#!/bin/sh\n' > run; chmod +x run; : > empty; : > empty-run; chmod +x empty-run
    mkdir dir dir/empty dir/.hidden; echo m > dir/.hidden/.file
    ln -s run link; ln -s /nowhere/at/all dangling; ln -s . self; ln -s ../.. up
    ln -s "$out/dir" absolute; ln -s "$(printf 'new\nline')" newline-link
    for n in 1 2 3 4 5 6 7 8 9; do head -c $n /dev/zero > pad$n; done
  '' [ ];
  # A NAR of more than 256 KiB, so that it reaches Nix before it has been read whole.
  large = build "large" "mkdir $out; seq 200000 > $out/data; echo end > $out/zzz" [ ];
  # A NAR of less.
  little = build "little" "mkdir $out; seq 2000 > $out/data" [ ];
  other = build "other" "mkdir $out; seq 2000 > $out/data; echo other > $out/name" [ ];
}
