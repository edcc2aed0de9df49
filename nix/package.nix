# Both programs, for `pkgs.callPackage`.
{
  lib,
  rustPlatform,
  installShellFiles,
  nix,
  testers,
  versionCheckHook,
}:
let
  cargo = lib.importTOML ../Cargo.toml;
in
rustPlatform.buildRustPackage (finalAttrs: {
  pname = "peerix";
  version = cargo.package.version;

  # What cargo and the tests read; another README does not build another program.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.toml
      ../.cargo
      ../Cargo.lock
      ../src
      ../tracker-src
      ../tests
      ../benches
      ../examples
      ../contrib/man
      ../contrib/avahi
      ../contrib/completions
    ];
  };
  cargoLock.lockFile = ../Cargo.lock;

  # Unit tests, and those of the programs that need neither root nor other machines, which the sandbox has not: the
  # rest makes network namespaces. `make test` and the virtual machines of passthru.tests run all of it.
  cargoTestFlags = [
    "--lib"
    "--bins"
    "--test=layout"
  ];
  nativeCheckInputs = [ nix ];

  nativeBuildInputs = [ installShellFiles ];
  postInstall = ''
    installManPage contrib/man/*.8
    installShellCompletion --bash contrib/completions/*.bash --fish contrib/completions/*.fish --zsh contrib/completions/_*
    install -D -m 644 -t $out/share/doc/peerix/avahi contrib/avahi/peerix.service
  '';

  nativeInstallCheckInputs = [ versionCheckHook ];
  doInstallCheck = true;

  passthru.tests = import ./tests {
    inherit testers;
    peerix = finalAttrs.finalPackage;
  };

  meta = {
    inherit (cargo.package) description;
    homepage = cargo.package.repository;
    changelog = "${cargo.package.repository}/blob/main/CHANGELOG.md";
    license = lib.licenses.gpl3Plus;
    platforms = lib.platforms.linux;
    mainProgram = "peerix";
  };
})
