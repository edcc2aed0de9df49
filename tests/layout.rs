//! Rules for the source that the compiler does not check: layers of modules, and hygiene.

use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Modules that every other module may use.
const HELPERS: &str = "backoff bounded_map lock log_throttle round_trip time_scale";

/// Each module with all further modules that it may use, from the highest layer to the lowest. A
/// module may use only modules that stand below it.
const MAY_USE: &[(&str, &str)] = &[
    ("main", "cli commands daemon service sockets"),
    (
        "commands",
        "cli config degraded http_client identity key_file lan network nix peers service access \
         status store trust wire",
    ),
    ("cli", "config nix upload_limit wire"),
    (
        "daemon",
        "config degraded fetch friends port_mapper http identity key_file lan lookup network nix \
         peers publish stats service access sockets status store trust upload_limit upstream wire",
    ),
    ("publish", "config network nix peers access store wire"),
    ("http", "config fetch friends lookup nix stats access status store upload_limit wire"),
    ("fetch", "config degraded lookup nix peers stats store trust upstream wire"),
    ("upstream", "config http_client lookup nix trust"),
    ("lookup", "nix peers stats trust wire"),
    ("status", "config degraded port_mapper lan network nix peers stats store trust wire"),
    (
        "peers",
        "config friends http_client lan network nix connect_rate resolver stats suspend wire",
    ),
    ("lan", "network nix access store suspend wire"),
    ("store", "nix"),
    ("port_mapper", "network wire"),
    ("access", "config fnmatch http_client network nix"),
    ("sockets", "config network"),
    ("identity", "wire"),
    ("backoff", "time_scale"),
    ("trust", "config degraded friends key_file nix wire"),
    ("friends", "config key_file wire"),
    ("degraded", ""),
    ("key_file", ""),
    ("http_client", ""),
    ("connect_rate", ""),
    ("upload_limit", ""),
    ("log_throttle", "lock"),
    ("service", ""),
    ("suspend", ""),
    ("time_scale", ""),
    ("stats", "nix"),
    ("config", "network nix wire"),
    ("network", "fnmatch"),
    ("fnmatch", ""),
    ("resolver", "wire"),
    ("wire", "nix"),
    ("nix", ""),
    ("lock", ""),
    ("bounded_map", ""),
    ("round_trip", ""),
];

/// Modules of the library that the tracker may use.
const TRACKER_MAY_USE: &str = "http nix connect_rate resolver service sockets wire";

/// Whether a list of modules contains `module`.
fn lists(modules: &str, module: &str) -> bool {
    modules.split(' ').any(|listed| listed == module)
}

#[test]
fn every_file_of_tests_is_compiled() {
    let tests = Path::new(ROOT).join("tests");
    let main = fs::read_to_string(tests.join("main.rs")).unwrap();
    for file in files(&tests).iter().filter(|file| file.parent() == Some(&tests)) {
        let name = file.file_name().unwrap().to_str().unwrap();
        let Some(module) = name.strip_suffix(".rs").filter(|module| *module != "main") else {
            continue;
        };
        assert!(main.contains(&format!("mod {module};\n")), "tests/{name} is not in tests/main.rs");
    }
}

#[test]
fn tracker_imports_only_allowed_modules() {
    let mut seen = 0;
    for file in files(&Path::new(ROOT).join("tracker-src")) {
        let text = fs::read_to_string(&file).unwrap();
        for used in modules_named_after("peerix::", &text) {
            seen += 1;
            assert!(
                lists(TRACKER_MAY_USE, used) || lists(HELPERS, used),
                "{}: the tracker may not use `{used}`",
                file.display()
            );
        }
        let http = text.match_indices("http::").map(|(at, part)| name(&text[at + part.len()..]));
        for part in http.flatten() {
            let of_the_server = ["body", "server", "Request", "Exchange"].contains(&part);
            assert!(of_the_server, "{}: `http::{part}` is the daemon's", file.display());
        }
    }
    assert!(seen > 10, "only {seen} imports were found: this test looks for them in the wrong way");
}

#[test]
fn imports_point_only_to_lower_layers() {
    for (at, (module, uses)) in MAY_USE.iter().enumerate() {
        for used in uses.split_terminator(' ') {
            let place = MAY_USE.iter().position(|(name, _)| *name == used);
            assert!(place > Some(at), "{module} may not use {used}, which is not below it");
        }
    }
    let src = Path::new(ROOT).join("src");
    let mut seen = 0;
    for file in files(&src).iter().filter(|file| file.extension().is_some_and(|e| e == "rs")) {
        let inside = file.strip_prefix(&src).unwrap();
        let first = inside.iter().next().unwrap().to_str().unwrap();
        let module = first.trim_end_matches(".rs");
        if module == "lib" {
            continue;
        }
        let Some((_, uses)) = MAY_USE.iter().find(|(name, _)| *name == module) else {
            panic!("src/{}: a module that has no place among the layers", inside.display());
        };
        let text = fs::read_to_string(file).unwrap();
        for used in modules_named(&text) {
            seen += 1;
            let is_helper = lists(HELPERS, used) && !lists(HELPERS, module);
            let fine = used == module || lists(uses, used) || is_helper;
            assert!(fine, "src/{}: `{module}` may not use `{used}`", inside.display());
        }
    }
    assert!(seen > 50, "only {seen} imports were found: this test looks for them in the wrong way");
}

#[test]
fn files_of_lan_import_each_other_without_cycles() {
    let mut left: Vec<(String, Vec<String>)> = Vec::new();
    for entry in fs::read_dir(Path::new(ROOT).join("src/lan")).unwrap() {
        let path = entry.unwrap().path();
        let module = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.is_file() && module != "mod" {
            let text = fs::read_to_string(&path).unwrap();
            let uses = modules_named_after("use super::", &text);
            left.push((module, uses.into_iter().map(str::to_owned).collect()));
        }
    }
    assert!(left.iter().any(|(module, uses)| module == "discovery" && uses.len() > 3));
    // Removes the files that use none of the others, again and again.
    while !left.is_empty() {
        let modules: Vec<String> = left.iter().map(|(module, _)| module.clone()).collect();
        left.retain(|(_, uses)| uses.iter().any(|used| modules.contains(used)));
        assert!(left.len() < modules.len(), "a cycle of imports among {modules:?}");
    }
}

/// Names of the modules after `crate::` and `peerix::`, in code and in documentation.
fn modules_named(text: &str) -> Vec<&str> {
    [modules_named_after("crate::", text), modules_named_after("peerix::", text)].concat()
}

fn modules_named_after<'a>(root: &str, text: &'a str) -> Vec<&'a str> {
    let mut named = Vec::new();
    for (at, _) in text.match_indices(root) {
        let rest = &text[at + root.len()..];
        match rest.strip_prefix('{') {
            Some(group) => named.extend(first_names(group)),
            None => named.extend(name(rest)),
        }
    }
    named
}

/// First name of each part of a group such as `a::{b, c}, d::e}`.
fn first_names(group: &str) -> Vec<&str> {
    let (mut names, mut depth, mut from) = (Vec::new(), 1, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => {
                names.extend(name(group[from..at].trim_start()));
                from = at + 1;
            }
            _ => {}
        }
        if depth == 0 {
            names.extend(name(group[from..at].trim_start()));
            break;
        }
    }
    names
}

fn name(text: &str) -> Option<&str> {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    (end > 0).then(|| &text[..end])
}

#[test]
fn imports_are_found_in_every_form() {
    let found = |text| {
        let mut names = modules_named(text);
        names.sort();
        names
    };
    assert_eq!(found("use crate::nix::HashPart;"), ["nix"]);
    assert_eq!(
        found("use crate::{\n    nix::{HashPart, Malformed},\n    wire,\n    store::*,\n};"),
        ["nix", "store", "wire"]
    );
    assert_eq!(found("fn f() { crate::peers::x() } /// [`crate::access`]"), ["access", "peers"]);
    assert_eq!(found("use peerix::cli::{self, Command};"), ["cli"]);
}

/// Builds elsewhere have neither the author's directories nor a private mirror.
#[test]
fn files_name_no_directory_or_mirror_of_one_machine() {
    // In two parts, so that this file does not contain the searched text itself.
    let machines = [("/wo", "rk/"), ("/tmp/", "setup"), ("/ho", "me/"), ("/Us", "ers/")]
        .map(|(a, b)| [a, b].concat());
    for file in files(Path::new(ROOT)) {
        let name = file.strip_prefix(ROOT).unwrap().display().to_string();
        let bytes = fs::read(&file).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        for line in text.lines() {
            let found = machines.iter().find(|machine| line.contains(machine.as_str()));
            assert_eq!(found, None, "{name}: {line}");
        }
        if name == "Cargo.lock" {
            let sources = text.lines().filter(|line| line.starts_with("source = "));
            let public = r#"source = "registry+https://github.com/rust-lang/crates.io-index""#;
            sources.for_each(|source| assert_eq!(source, public));
        }
        let is_setting = ["Makefile", "Cargo.toml", ".cargo/config.toml", ".ci/run"]
            .contains(&&*name)
            || name.starts_with("scripts/");
        for word in text.split_whitespace().filter(|_| is_setting) {
            let Some((_, rest)) = word.split_once("://") else { continue };
            let host = rest.split(['/', '"', ')', ',']).next().unwrap_or_default();
            // An empty host: Nix store URLs such as `dummy://`.
            let known = ["github.com", "rustup.rs", "nixos.org", ""].contains(&host);
            assert!(known, "{name}: a host that not everybody reaches? {word}");
        }
    }
}

/// All files below `dir`, without `.git`, `target` and symlinks.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_owned();
        if name == ".git" || name == "target" {
            continue;
        } else if path.is_dir() {
            all.extend(files(&path));
        } else if !path.is_symlink() {
            all.push(path);
        }
    }
    all
}
