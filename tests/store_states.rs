//! The states in which Nix leaves its database, each read as an unprivileged user while real Nix
//! writes.
//!
//! The test starts its own program again: once as root in a mount namespace with an empty `/nix`,
//! so that the machine's own store stays untouched, and from there as user 65534. That process
//! answers lookups line by line.

use crate::common::DEADLINE;
use peerix::{
    nix::{HashPart, StoreDir, StorePath},
    store::{Store, StoreConfig, StoreError},
    time_scale::TIMEOUT_SCALE,
};
use std::{
    env,
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
        net::UnixStream,
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Name of the test, with which the program starts itself again.
const TEST: &str = "store_states::every_state_of_the_database";
const ROLE: &str = "PEERIX_TEST_ROLE";
/// Printed at the end of the namespace's run: a program without a test of that name also succeeds.
const DONE: &str = "every state was read";
const NOBODY: u32 = 65534;
const DB: &str = "/nix/var/nix/db/db.sqlite";
const SOCKET: &str = "/nix/var/nix/daemon-socket/socket";

#[test]
fn every_state_of_the_database() {
    match env::var(ROLE).as_deref() {
        Ok("reader") => return reader(),
        Ok("namespace") => return in_namespace(),
        _ => {}
    }
    assert!(rustix::process::geteuid().is_root(), "not root, who alone becomes another user");
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(env::current_exe().unwrap())
        .args(["--exact", TEST, "--nocapture"])
        .env(ROLE, "namespace")
        .env_remove("NIX_REMOTE")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains(DONE), "{}\n{said}\n{error}", output.status);
}

fn in_namespace() {
    fs::create_dir_all("/nix").unwrap();
    run("mount", &["-t", "tmpfs", "-o", "mode=755", "tmpfs", "/nix"]);
    fs::create_dir_all("/nix/store").unwrap();
    run("nix-store", &["--init"]);
    fs::copy(env::current_exe().unwrap(), "/nix/reader").unwrap();

    let first = add("first");
    idle_without_daemon(&first);
    files_in_part(&first);
    after_a_crash();
    with_daemon(&first);
    while_nix_writes(&first);
    not_permitted();
    same_bytes_as_nix();
    same_log_as_nix();
    println!("{DONE}");
}

fn idle_without_daemon(first: &str) {
    // Nix up to 2.8 at least removes the files when it ends; later versions leave them.
    close_database();
    let mut reader = Reader::start();
    assert!(!wal().exists() && !shm().exists());
    reader.finds(first);
    assert!(reader.log().contains("read as immutable"), "{}", reader.log());
    let second = add("second");
    close_database();
    assert!(!wal().exists() && !shm().exists());
    reader.finds(&second);
    run("nix-store", &["--delete", &second]);
    reader.misses(&second);
    // Another process opens the database, and from then on the reader keeps it open.
    let somebody = open_read_write();
    reader.finds(first);
    assert!(reader.log().contains("opened read-only\n"), "{}", reader.log());
    drop(somebody);
    assert!(wal().exists() && shm().exists());
    let third = add("third");
    reader.finds(&third);
    drop(reader);
    close_database();
}

fn files_in_part(first: &str) {
    for files in [vec![wal()], vec![shm()], vec![wal(), shm()]] {
        files.iter().for_each(|file| fs::write(file, "").unwrap());
        let mut reader = Reader::start();
        reader.finds(first);
        files.iter().for_each(|file| assert!(file.exists()));
        drop(reader);
        close_database();
    }
}

fn after_a_crash() {
    // A killed writer leaves a path that only the write-ahead log has.
    let path = format!("/nix/store/{}-crash", "0".repeat(32));
    let writer = open_read_write();
    writer.execute_batch("pragma wal_autocheckpoint = 0").unwrap();
    writer
        .execute(
            "insert into ValidPaths (path, hash, registrationTime, narSize) values (?1, ?2, 1, 112)",
            [&path, &format!("sha256:{}", "0".repeat(64))],
        )
        .unwrap();
    let left: Vec<_> =
        [PathBuf::from(DB), wal(), shm()].map(|file| (fs::read(&file).unwrap(), file)).into();
    drop(writer);
    let restore = || left.iter().for_each(|(bytes, file)| fs::write(file, bytes).unwrap());

    let restore_shm = || fs::write(shm(), &left[2].0).unwrap();
    let prepare_without_shm = || {
        restore();
        fs::remove_file(shm()).unwrap();
    };

    restore();
    Reader::start().finds(&path);

    // Nobody opens the database, so this reader waits in vain.
    prepare_without_shm();
    let mut reader = Reader::with_timeouts("3");
    let answer = reader.ask(&path);
    assert!(answer.contains("see that nix-daemon runs") && !answer.contains('\n'), "{answer}");
    restore_shm();
    reader.finds(&path);
    drop(reader);

    // A process that opens or closes the database may pause while only one of the files exists.
    prepare_without_shm();
    let mut reader = Reader::start();
    reader.send(&path);
    thread::sleep(Duration::from_millis(500));
    restore_shm();
    assert_eq!(reader.receive(), path);
    drop(reader);

    let daemon = Daemon::start();
    prepare_without_shm();
    let mut reader = Reader::start();
    reader.finds(&path);
    assert!(reader.log().contains("after nix-daemon had opened it"), "{}", reader.log());
    drop((reader, daemon));
    close_database();
}

fn with_daemon(first: &str) {
    let daemon = Daemon::start();
    let mut reader = Reader::start();
    reader.finds(first);
    assert!(reader.log().contains("after nix-daemon had opened it"), "{}", reader.log());
    let added = add("with daemon");
    reader.finds(&added);
    drop(daemon);
    // The reader's own connection keeps the files.
    assert!(wal().exists() && shm().exists());
    let added = add("after daemon");
    reader.finds(&added);
    drop(reader);
    close_database();
}

fn while_nix_writes(first: &str) {
    for kept_open in [true, false] {
        let somebody = kept_open.then(open_read_write);
        let mut reader = Reader::start();
        let mut hammer = Reader::start();
        hammer.send(&format!("hammer {first}"));
        for round in 0..60 {
            let added = add(&format!("round {kept_open} {round}"));
            reader.finds(&added);
        }
        hammer.send("stop");
        let said = hammer.receive();
        assert!(
            said.ends_with(" lookups, 0 failed") && !said.starts_with("0 "),
            "{said}: {}",
            hammer.log()
        );
        drop((somebody, reader, hammer));
        close_database();
    }
}

fn not_permitted() {
    let somebody = open_read_write();
    for (file, mode, says) in [
        (PathBuf::from(DB), 0o600, "not readable"),
        (wal(), 0o600, "not readable"),
        (shm(), 0o600, "not readable"),
    ] {
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        let answer = Reader::start().ask(&format!("/nix/store/{}-x", "1".repeat(32)));
        assert!(answer.contains(says) && answer.contains(file.to_str().unwrap()), "{answer}");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    }
    drop(somebody);
    let dir = Path::new(DB).parent().unwrap();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).unwrap();
    let answer = Reader::start().ask(&format!("/nix/store/{}-x", "1".repeat(32)));
    assert!(answer.contains("not readable"), "{answer}");
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    close_database();
}

fn same_bytes_as_nix() {
    let tree = Path::new("/nix/tree");
    let name = |bytes: &[u8]| tree.join(OsStr::from_bytes(bytes));
    fs::create_dir_all(name(b"a/b/c/empty")).unwrap();
    for (file, len) in [
        (&b"a-"[..], 1),
        (b"a.", 7),
        (b"a/0", 0),
        (b"A", 8),
        (b"large", 3 << 20),
        (b"\xff \n\xfe", 9),
    ] {
        fs::write(name(file), vec![b'x'; len]).unwrap();
    }
    (0..3000).for_each(|n| fs::write(name(format!("a/b/{n}").as_bytes()), format!("{n}")).unwrap());
    fs::set_permissions(name(b"a."), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("../a/b", name(b"link")).unwrap();
    symlink("/nowhere", "/nix/dangling").unwrap();
    fs::write("/nix/plain", "plain").unwrap();

    let store = open().unwrap();
    for source in ["/nix/tree", "/nix/dangling", "/nix/plain"] {
        let path = output("nix-store", &["--add", source]);
        let path = path.trim_end();
        let info = store.path_info(&hash_part(path)).unwrap().unwrap();
        let dumped = Command::new("nix-store").args(["--dump", path]).output().unwrap().stdout;
        assert_eq!(info.nar_size, dumped.len() as u64);
        assert_eq!(
            output("nix-store", &["-q", "--hash", path]).trim_end(),
            info.nar_hash.to_string()
        );
        let mut nar = Vec::new();
        store.write_nar(&info, 0..info.nar_size, &mut nar).unwrap();
        assert!(nar == dumped, "{source}");
        let middle = info.nar_size / 3..info.nar_size * 2 / 3;
        nar.clear();
        store.write_nar(&info, middle.clone(), &mut nar).unwrap();
        assert!(nar == dumped[middle.start as usize..middle.end as usize]);
        let listed = Command::new("nix")
            .args([
                "--extra-experimental-features",
                "nix-command",
                "store",
                "ls",
                "--json",
                "-R",
                path,
            ])
            .output()
            .unwrap();
        let theirs: serde_json::Value =
            serde_json::from_str(&String::from_utf8_lossy(&listed.stdout)).unwrap();
        let ours: serde_json::Value =
            serde_json::from_slice(&store.listing(&info).unwrap()).unwrap();
        assert!(without_offsets(ours["root"].clone()) == theirs, "{source}");
    }
}

/// Removes the offsets of files in the NAR, which `nix store ls` does not print.
fn without_offsets(mut node: serde_json::Value) -> serde_json::Value {
    let object = node.as_object_mut().unwrap();
    object.remove("narOffset");
    if let Some(entries) = object.get_mut("entries").and_then(serde_json::Value::as_object_mut) {
        entries.values_mut().for_each(|entry| *entry = without_offsets(entry.take()));
    }
    node
}

fn same_log_as_nix() {
    let expression = "derivation { name = \"built\"; system = builtins.currentSystem; builder = \"/bin/sh\"; \
                      args = [ \"-c\" \"echo building; echo ${builtins.toFile \"dependency\" \"x\"} $out > $out\" ]; }";
    let derivation = output("nix-instantiate", &["-E", expression]);
    let derivation = derivation.trim_end();
    let built = output(
        "nix-store",
        &["-r", "--option", "build-users-group", "", "--option", "sandbox", "false", derivation],
    );
    let store = open().unwrap();
    let info = store.path_info(&hash_part(built.trim_end())).unwrap().unwrap();
    let mut theirs: Vec<_> = output("nix-store", &["-q", "--references", built.trim_end()])
        .lines()
        .map(|line| StoreDir::parse("/nix/store").unwrap().parse_path(line).unwrap())
        .collect();
    theirs.sort();
    assert_eq!(info.references, theirs);
    assert_eq!(info.references.len(), 2);
    assert_eq!(
        info.deriver.as_ref().map(StorePath::base_name),
        derivation.strip_prefix("/nix/store/")
    );
    let log = store.log(info.deriver.as_ref().unwrap()).unwrap().unwrap();
    let mut text = String::new();
    assert_eq!(log.len, 9);
    { log.reader }.read_to_string(&mut text).unwrap();
    assert_eq!(text, "building\n");
    assert_eq!(output("nix-store", &["--read-log", derivation]), text);
}

fn open() -> Result<Store, StoreError> {
    Store::open(StoreConfig {
        store_dir: StoreDir::parse("/nix/store").unwrap(),
        db: DB.into(),
        root: "/".into(),
    })
}

fn hash_part(path: &str) -> HashPart {
    StoreDir::parse("/nix/store").unwrap().parse_path(path).unwrap().hash_part()
}

fn wal() -> PathBuf {
    format!("{DB}-wal").into()
}

fn shm() -> PathBuf {
    format!("{DB}-shm").into()
}

fn run(program: &str, args: &[&str]) {
    output(program, args);
}

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Adds a file with this text to the store, and returns its path.
fn add(text: &str) -> String {
    fs::write("/nix/added", text).unwrap();
    output("nix-store", &["--add", "/nix/added"]).trim_end().to_owned()
}

fn open_read_write() -> rusqlite::Connection {
    let connection = rusqlite::Connection::open(DB).unwrap();
    connection
        .query_row("select count(*) from ValidPaths", [], |row| row.get::<_, i64>(0))
        .unwrap();
    connection
}

/// Opens and closes the database as its last user, which removes the files beside it. Panics if
/// another process keeps it open for longer than [`DEADLINE`].
fn close_database() {
    let deadline = Instant::now() + DEADLINE;
    while wal().exists() || shm().exists() {
        drop(open_read_write());
        if !wal().exists() {
            // Without a write-ahead log, SQLite does not remove this file.
            let _ = fs::remove_file(shm());
        }
        assert!(Instant::now() < deadline, "somebody keeps the database open");
        thread::yield_now();
    }
}

struct Daemon(Child);

impl Daemon {
    /// Starts nix-daemon and waits until it listens and has the database closed.
    fn start() -> Self {
        let daemon = Daemon(
            Command::new("nix-daemon").stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap(),
        );
        let deadline = Instant::now() + DEADLINE;
        let mut connection = loop {
            if let Ok(connection) = UnixStream::connect(SOCKET) {
                break connection;
            }
            assert!(Instant::now() < deadline, "nix-daemon does not listen");
            thread::yield_now();
        };
        // nix-daemon opens the database for this connection too; wait until it has closed it.
        connection.shutdown(Shutdown::Write).unwrap();
        connection.set_read_timeout(Some(DEADLINE)).unwrap();
        let _ = connection.read_to_end(&mut Vec::new());
        close_database();
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
        let _ = fs::remove_file(SOCKET);
    }
}

/// This program running as another user, which answers lookups.
struct Reader {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
    log: String,
}

impl Reader {
    /// Starts with timeouts that are long enough for a busy machine, on which a reader may meet
    /// each of Nix's short writes for seconds.
    fn start() -> Self {
        Reader::with_timeouts("20")
    }

    /// Starts with timeouts that are this many times as long.
    fn with_timeouts(scale: &str) -> Self {
        let mut child = Command::new("/nix/reader")
            .args(["--exact", TEST, "--nocapture", "--test-threads=1"])
            .env(ROLE, "reader")
            .env(TIMEOUT_SCALE, scale)
            .uid(NOBODY)
            .gid(NOBODY)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let to = child.stdin.take();
        let from = BufReader::new(child.stdout.take().unwrap());
        Reader { child, to, from, log: String::new() }
    }

    fn send(&mut self, line: &str) {
        writeln!(self.to.as_mut().unwrap(), "{line}").unwrap();
    }

    fn receive(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.from.read_line(&mut line).unwrap() > 0, "the reader died");
            // The test runner does not end its own line, so the answer may follow it.
            if let Some((_, answer)) = line.split_once("> ") {
                return answer.trim_end().to_owned();
            }
            self.log.push_str(&line);
        }
    }

    fn ask(&mut self, path: &str) -> String {
        self.send(path);
        self.receive()
    }

    fn finds(&mut self, path: &str) {
        assert_eq!(self.ask(path), path);
    }

    fn misses(&mut self, path: &str) {
        assert_eq!(self.ask(path), "none");
    }

    /// Everything that the reader logged before its last answer.
    fn log(&self) -> &str {
        &self.log
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        drop(self.to.take());
        let _ = self.child.wait();
    }
}

/// Reads a line. Releases the lock of standard input at once, because another thread may read
/// the next line.
fn next_line() -> Option<String> {
    let mut line = String::new();
    let bytes = std::io::stdin().read_line(&mut line).unwrap();
    (bytes > 0).then(|| line.trim_end().to_owned())
}

/// Repeats a lookup while the database is locked, for at most [`DEADLINE`].
fn retry_while_busy<T>(lookup: impl Fn() -> Result<T, StoreError>) -> Result<T, StoreError> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match lookup() {
            Err(StoreError::Busy { .. }) if Instant::now() < deadline => {}
            done => return done,
        }
    }
}

fn reader() {
    assert!(!rustix::process::geteuid().is_root());
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Info)
        .target(env_logger::Target::Stdout)
        .format(|out, record| writeln!(out, "{}", record.args()))
        .init();
    let mut store = None;
    let mut answer = |path: &str| {
        let part = hash_part(path);
        if store.is_none() {
            store = Some(open()?);
        }
        let store = store.as_ref().unwrap();
        // On a busy machine another process may hold its lock for longer than a lookup waits.
        let info = retry_while_busy(|| store.path_info(&part))?;
        assert_eq!(
            retry_while_busy(|| store
                .path_infos_quickly(&[part])
                .map(|mut infos| infos.remove(0)))?,
            info
        );
        Ok::<_, StoreError>(
            info.map_or("none".to_owned(), |info| format!("/nix/store/{}", info.path)),
        )
    };
    while let Some(line) = next_line() {
        if let Some(path) = line.strip_prefix("hammer ") {
            let stopped = thread::spawn(next_line);
            let (mut lookups, mut failed) = (0u64, 0u64);
            while !stopped.is_finished() {
                lookups += 1;
                match answer(path) {
                    Ok(found) if found == path => {}
                    other => {
                        println!("{other:?}");
                        failed += 1;
                    }
                }
            }
            println!("> {lookups} lookups, {failed} failed");
            continue;
        }
        println!("> {}", answer(&line).unwrap_or_else(|error| error.to_string()));
    }
}
