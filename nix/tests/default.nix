# The module in virtual machines, by the NixOS test driver. `make vm-test` runs the same steps on Debian where there is
# no nixpkgs.
{ testers, peerix }:
{
  lan = testers.runNixOSTest (import ./lan.nix { inherit peerix; });
  wan = testers.runNixOSTest (import ./wan.nix { inherit peerix; });
}
