//! Real Nix on a host.

use super::lan::{Host, Run};
use super::{DEADLINE, last_lines};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::SystemTime;

/// The directory of the Nix under test: `NIX_BIN_DIR`, else the one on `PATH`.
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

/// The root directory that Nix needs around it: that of its debootstrap directory, else `/`.
pub fn root() -> &'static Path {
    let prefix = bin_dir().parent().and_then(Path::parent);
    prefix.filter(|prefix| prefix.join("etc/debian_version").exists()).unwrap_or(Path::new("/"))
}

/// The directory of Nix's programs as a host sees it.
pub fn bin_dir_inside() -> String {
    let inside = bin_dir().strip_prefix(root()).expect("the root is a prefix");
    Path::new("/").join(inside).display().to_string()
}

/// `nix.conf` of every host. Nix's own limits (25 connections) stay as they are; `extra` lines come
/// last and win.
pub fn configure(host: &Host, extra: &str) {
    host.write(
        "/etc/nix/nix.conf",
        format!(
            "sandbox = false\nbuild-users-group =\nexperimental-features = nix-command\nsubstituters =\n\
             max-jobs = 16\nfsync-metadata = false\n{extra}"
        ),
    );
}

/// `nix.conf` of a host that asks its own peerix, and after it `next` (a URL or nothing); only
/// paths that one of `keys` signed are taken.
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
    host.cmd("nix-store").arg("--init").okay();
}

/// `nix-store --realise`, to be run; it ends at the latest after [`DEADLINE`].
pub fn realising(host: &Host, paths: &[&str]) -> Command {
    let mut command = host.cmd("timeout");
    command
        .arg(DEADLINE.as_secs().to_string())
        .args(["nix-store", "--no-gc-warning", "--realise"])
        .args(paths);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// `nix-store --realise`.
pub fn realise(host: &Host, paths: &[&str]) -> Output {
    realising(host, paths).output().expect("nsenter starts")
}

/// Nix asks the host's own peerix for the narinfos of all that `path` needs, and remembers none of
/// them. Returns the store paths, one a line; panics if one was not found.
pub fn look_up_closure(host: &Host, path: &str) -> String {
    let url = format!("http://127.0.0.1:{}", super::PORT);
    let script = r#"export XDG_CACHE_HOME=$(mktemp -d); trap 'rm -r "$XDG_CACHE_HOME"' EXIT; "$@""#;
    let nix = ["nix", "path-info", "--recursive", "--store", &url, path];
    host.cmd("sh").args(["-ec", script, "look-up"]).args(nix).okay()
}

/// What Nix told the user, if it told of anything going wrong.
pub fn complaint(output: &Output) -> Option<String> {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let bad = !output.status.success()
        || ["error", "warning", "mismatch", "corrupt"].iter().any(|word| said.contains(word));
    bad.then(|| format!("{}\n{}", output.status, last_lines(&said)))
}

/// Realises and panics if Nix failed or complained.
pub fn realise_quietly(host: &Host, paths: &[&str]) {
    assert_quiet(&realise(host, paths));
}

/// Panics if Nix failed or complained.
pub fn assert_quiet(output: &Output) {
    if let Some(complaint) = complaint(output) {
        panic!("nix-store --realise: {complaint}");
    }
}

/// Panics if Nix failed, whatever it said on the way.
pub fn assert_succeeded(output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{}", output.status, last_lines(&said));
}

/// The valid paths that `paths` need, themselves among them.
pub fn closure(host: &Host, paths: &[&str]) -> Vec<String> {
    let text = host.cmd("nix-store").args(["--query", "--requisites"]).args(paths).okay();
    text.lines().map(str::to_owned).collect()
}

/// Every valid path of a store.
pub fn valid_paths(host: &Host) -> Vec<String> {
    let text = host.cmd("nix").args(["path-info", "--all"]).okay();
    text.lines().map(str::to_owned).collect()
}

/// Checks by Nix (`nix-store --verify-path`) and byte for byte against the directory they came from
/// that `paths` are whole, and registered.
pub fn assert_whole(host: &Host, paths: &[&str], from: &Path) {
    host.cmd("nix-store").args(["--verify-path"]).args(paths).okay();
    for path in paths {
        let base_name = path.rsplit('/').next().expect("a path has a name");
        super::tree::assert_same(&from.join(base_name), &host.path(path));
    }
}

/// Checks that nothing but `paths` is registered in the store, and that it is all sound.
pub fn assert_nothing_but(host: &Host, paths: &[String]) {
    for path in valid_paths(host) {
        assert!(paths.contains(&path), "{} has {path} registered", host.name);
    }
    host.cmd("nix-store").args(["--verify", "--check-contents"]).okay();
}

/// Tells one Nix from another: its program's place, size and time. (Some don't even say their
/// version without `/proc`.)
pub fn identity() -> (PathBuf, u64, Option<SystemTime>) {
    let program = bin_dir().join("nix-store");
    let metadata = std::fs::metadata(&program).expect("nix-store is there");
    (program, metadata.len(), metadata.modified().ok())
}

/// The hash of some bytes as narinfos have it.
pub fn hash(host: &Host, bytes: &[u8]) -> String {
    host.write("/tmp/hashed", bytes);
    let digits =
        host.cmd("nix-hash").args(["--flat", "--base32", "--type", "sha256", "/tmp/hashed"]).okay();
    format!("sha256:{}", digits.trim())
}
