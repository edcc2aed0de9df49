# Three machines on one network: a has paths and signs them, b and c want them.
{ peerix }:
let
  machine = import ./machine.nix peerix;
  keys = ../../tests/data;
in
{
  name = "peerix-lan";

  nodes = {
    a = {
      imports = [ machine ];
      virtualisation.vlans = [ 1 ];
      environment.etc."peerix/secret-key" = {
        source = keys + "/secret-key";
        mode = "0400";
      };
      services.peerix.privateKeyFile = "/etc/peerix/secret-key";
      specialisation.closed.configuration.services.peerix.openFirewall = false;
    };

    b =
      { lib, ... }:
      {
        imports = [ machine ];
        virtualisation.vlans = [ 1 ];
        services.peerix.publicKey = lib.fileContents (keys + "/public-key");
      };

    c = {
      imports = [ machine ];
      virtualisation.vlans = [ 1 ];
      environment.etc."peerix/public-key".source = keys + "/public-key";
      services.peerix = {
        publicKeyFile = "/etc/peerix/public-key";
        # What systemd makes of these has to be what the daemon gets.
        peerId = ''c "%i" '$HOME' \n; *'';
        filterPatterns = [
          "-*"
          "[a-z] ü%%"
          "$\{x}"
        ];
      };
    };
  };

  testScript = builtins.readFile ../../tests/vm/common.py + builtins.readFile ../../tests/vm/lan.py;
}
