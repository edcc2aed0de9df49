//! Real Nix as a client on a host.

use super::lan::{Host, Run};
use super::{DEADLINE, directory, last_lines};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::SystemTime;

/// The directory of the Nix under test: `NIX_BIN_DIR`, else the first with `nix-store` on `PATH`.
fn bin_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let given = std::env::var_os("NIX_BIN_DIR").map(PathBuf::from);
        let dir = given.or_else(|| {
            let path = std::env::var_os("PATH")?;
            std::env::split_paths(&path).find(|dir| dir.join("nix-store").exists())
        });
        dir.expect("nix-store is not on PATH (Debian has it in nix-bin) and NIX_BIN_DIR is not set")
    })
}

/// The root directory that Nix needs: the debootstrap directory that it lies in, else `/`.
pub fn root() -> &'static Path {
    let prefix = bin_dir().parent().and_then(Path::parent);
    prefix.filter(|prefix| prefix.join("etc/debian_version").exists()).unwrap_or(Path::new("/"))
}

/// The directory of Nix's programs as a host sees it.
pub fn bin_dir_inside() -> String {
    let inside = bin_dir().strip_prefix(root()).expect("the root is a prefix");
    Path::new("/").join(inside).display().to_string()
}

/// Writes the `nix.conf` of a host. Nix's own limits (25 connections) stay. The lines in `extra`
/// come last, so they override.
pub fn configure(host: &Host, extra: &str) {
    host.write(
        "/etc/nix/nix.conf",
        format!(
            "sandbox = false\nbuild-users-group =\nexperimental-features = nix-command\nsubstituters =\n\
             max-jobs = 16\nfsync-metadata = false\ngc-reserved-space = 0\n{extra}"
        ),
    );
}

/// Generates the key pair `<host>-1` in `/etc/peerix.sec` and `/etc/peerix.pub` of a host, and
/// returns the public key.
pub fn generate_key(host: &Host) -> String {
    let name = format!("{}-1", host.name);
    let files = ["/etc/peerix.sec", "/etc/peerix.pub"];
    host.cmd("nix-store").args(["--generate-binary-cache-key", &name]).args(files).okay();
    let key = std::fs::read_to_string(host.path(files[1])).expect("Nix has written it");
    key.trim().to_owned()
}

/// Configures a host to ask its own peerix and the substituter `next` (a URL or empty), and to
/// accept only paths that one of `keys` signed. Initialises the store.
pub fn configure_client(host: &Host, next: &str, keys: &[&str]) {
    configure(
        host,
        &format!(
            "substituters = {next}\nextra-substituters = http://127.0.0.1:{}\nrequire-sigs = true\n\
             trusted-public-keys = {}\n",
            super::PORT,
            keys.join(" ")
        ),
    );
    init_store(host);
}

/// Initialises the store of a host if it has none. `nix-store --init` does so for the first host;
/// others get a copy, which takes a tenth of the time.
pub fn init_store(host: &Host) {
    if host.path("/nix/var/nix/db/db.sqlite").exists() {
        return;
    }
    let empty = fixture_dir("empty-store", ());
    if empty.exists() {
        host.sh(&format!("cp -a '{}/.' /nix/", empty.display()));
        return;
    }
    host.cmd("nix-store")
        .args(["--init", "--option", "gc-reserved-space", "0", "--option", "build-users-group", ""])
        .okay();
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let part = empty.with_extension(format!("{}-{number}", std::process::id()));
    host.sh(&format!("rm -rf '{0}'; cp -a /nix '{0}'", part.display()));
    // Another test may have been sooner.
    if std::fs::rename(&part, &empty).is_err() {
        let _ = std::fs::remove_dir_all(&part);
    }
}

/// A `nix-store --realise` that is not started yet. It ends after [`DEADLINE`] at the latest.
pub fn realising(host: &Host, paths: &[&str]) -> Command {
    let mut command = host.cmd("timeout");
    command
        .arg(DEADLINE.as_secs().to_string())
        .args(["nix-store", "--no-gc-warning", "--realise"])
        .args(paths);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs `nix-store --realise` to its end, for at most [`DEADLINE`].
pub fn realise(host: &Host, paths: &[&str]) -> Output {
    realising(host, paths).output().expect("nsenter starts")
}

/// Nix asks the host's own peerix for the narinfos of all that `path` needs, over 25 connections,
/// and caches none of them. Returns the store paths that it found.
///
/// # Panics
/// If Nix fails, as it does when a narinfo is missing.
pub fn look_up_closure(host: &Host, path: &str) -> Vec<String> {
    // An empty store of its own: Nix asks for each path, whatever the host's store has.
    let script = r#"export XDG_CACHE_HOME=$(mktemp -d) NIX_REMOTE=; trap 'chmod -R u+w "$XDG_CACHE_HOME"; rm -r "$XDG_CACHE_HOME"' EXIT
        "$@" --store "$XDG_CACHE_HOME/store""#;
    let nix = ["nix-store", "--realise", "--dry-run", path];
    let output = host.cmd("sh").args(["-ec", script, "look-up"]).args(nix).output();
    let output = output.expect("nsenter starts");
    assert_succeeded(&output);
    let said = String::from_utf8_lossy(&output.stderr);
    said.lines()
        .map(str::trim)
        .filter(|line| line.starts_with("/nix/store/"))
        .map(str::to_owned)
        .collect()
}

/// Nix's messages, if it failed or printed a warning or an error.
pub fn complaint(output: &Output) -> Option<String> {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let bad = !output.status.success()
        || ["error", "warning", "mismatch", "corrupt"].iter().any(|word| said.contains(word));
    bad.then(|| format!("{}\n{}", output.status, last_lines(&said)))
}

/// Realises `paths`. Panics if Nix failed or printed a warning or an error.
pub fn realise_quietly(host: &Host, paths: &[&str]) {
    assert_quiet(&realise(host, paths));
}

/// Panics if Nix failed or printed a warning or an error.
pub fn assert_quiet(output: &Output) {
    if let Some(complaint) = complaint(output) {
        panic!("nix-store --realise: {complaint}");
    }
}

/// Panics if Nix failed. Ignores its messages.
pub fn assert_succeeded(output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{}", output.status, last_lines(&said));
}

/// The closure of `paths`, including `paths`.
pub fn closure(host: &Host, paths: &[&str]) -> Vec<String> {
    let text = host.cmd("nix-store").args(["--query", "--requisites"]).args(paths).okay();
    text.lines().map(str::to_owned).collect()
}

/// All valid paths of a store.
pub fn valid_paths(host: &Host) -> Vec<String> {
    let text = host.cmd("nix").args(["path-info", "--all"]).okay();
    text.lines().map(str::to_owned).collect()
}

/// Panics unless `paths` are registered and complete: Nix verifies them (`nix-store
/// --verify-path`), and they equal the directory `from` byte for byte.
pub fn assert_whole(host: &Host, paths: &[&str], from: &Path) {
    host.cmd("nix-store").args(["--verify-path"]).args(paths).okay();
    for path in paths {
        let base_name = path.rsplit('/').next().expect("a path has a name");
        super::tree::assert_same(&from.join(base_name), &host.path(path));
    }
}

/// Panics if the store has a valid path other than `paths`, or if Nix finds a corrupt one.
pub fn assert_nothing_but(host: &Host, paths: &[String]) {
    for path in valid_paths(host) {
        assert!(paths.contains(&path), "{} has {path} registered", host.name);
    }
    host.cmd("nix-store").args(["--verify", "--check-contents"]).okay();
}

/// The directory of a fixture that the Nix under test makes from `input`, kept between runs.
pub fn fixture_dir(name: &str, input: impl Hash) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    (input, identity()).hash(&mut hasher);
    directory().join(format!("{name}-{:016x}", hasher.finish()))
}

/// Identifies a Nix by path, size and modification time of `nix-store`. Some versions cannot print
/// their version without `/proc`.
fn identity() -> (PathBuf, u64, Option<SystemTime>) {
    let program = bin_dir().join("nix-store");
    let metadata = std::fs::metadata(&program).expect("nix-store is there");
    (program, metadata.len(), metadata.modified().ok())
}

/// The SHA-256 hash of `bytes` in the format of narinfos.
pub fn hash(host: &Host, bytes: &[u8]) -> String {
    host.write("/tmp/hashed", bytes);
    let digits =
        host.cmd("nix-hash").args(["--flat", "--base32", "--type", "sha256", "/tmp/hashed"]).okay();
    format!("sha256:{}", digits.trim())
}
