# Two machines on two networks, and between them a third that is their router and tracker.
{ peerix }:
let
  machine = import ./machine.nix peerix;
  keys = ../../tests/data;
  peer =
    vlan:
    { lib, ... }:
    {
      imports = [ machine ];
      virtualisation.vlans = [ vlan ];
      environment.etc."peerix/secret-key" = {
        source = keys + "/secret-key";
        mode = "0400";
      };
      services.peerix = {
        mode = "wan";
        # c is the third machine on either network.
        trackerUrl = "http://192.168.${toString vlan}.3:12305";
        privateKeyFile = "/etc/peerix/secret-key";
        publicKey = lib.fileContents (keys + "/public-key");
        # There is no upstream cache here that could have the paths too.
        noVerify = true;
      };
    };
in
{
  name = "peerix-wan";

  nodes = {
    a = peer 1;
    b = peer 2;
    c = {
      imports = [ machine ];
      virtualisation.vlans = [
        1
        2
      ];
      services.peerix.enable = false;
      services.peerix.tracker.enable = true;
    };
  };

  testScript = builtins.readFile ../../tests/vm/common.py + builtins.readFile ../../tests/vm/wan.py;
}
