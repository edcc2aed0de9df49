//! nixos-module.nix: its options, what it rejects, and the unit files it generates. Real Nix
//! evaluates it against a stand-in for nixpkgs' `lib` (tests/module). `make vm-test` checks that
//! systemd interprets the units as intended.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn nix_instantiate(expression: &str) -> Output {
    // The dummy store suffices, because the evaluation reads nothing that must be in a store.
    run("dummy://", expression)
}

fn run(store: &str, expression: &str) -> Output {
    let program = std::env::var_os("NIX_BIN_DIR")
        .map_or("nix-instantiate".into(), |dir| Path::new(&dir).join("nix-instantiate"));
    let mut command = Command::new(program);
    command.args(["--store", store, "--eval", "--strict", "--json", "-E"]).arg(expression);
    command.current_dir(ROOT).stdin(Stdio::null()).output().expect("nix-instantiate runs")
}

fn eval(expression: &str) -> Value {
    let output = nix_instantiate(expression);
    assert!(output.status.success(), "{expression}\n{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Evaluates with a writable store, into which Nix copies files beside a configuration.
fn eval_with_store(expression: &str) -> Value {
    let store = Path::new(env!("CARGO_TARGET_TMPDIR")).join("module-store");
    let output = run(store.to_str().unwrap(), expression);
    assert!(output.status.success(), "{expression}\n{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The result of a NixOS configuration, in the form of tests/module/render.nix.
fn machine(config: &str) -> Value {
    eval(&format!("(import ./tests/module/eval.nix).module {{ {config} }}"))
}

/// The result of a NixOS configuration that enables peerix and adds `config`.
fn peerix(config: &str) -> Value {
    machine(&format!("services.peerix.enable = true; {config}"))
}

fn refused(config: &str) -> String {
    let expression = format!("(import ./tests/module/eval.nix).module {{ {config} }}");
    let output = nix_instantiate(&expression);
    assert!(!output.status.success(), "{config} is taken");
    String::from_utf8(output.stderr).unwrap()
}

/// All values of a setting in a unit file, in order.
fn settings<'a>(machine: &'a Value, unit: &str, name: &str) -> Vec<&'a str> {
    let text = machine["units"][unit].as_str().unwrap_or_else(|| panic!("no {unit}"));
    text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('=')).collect()
}

fn setting<'a>(machine: &'a Value, unit: &str, name: &str) -> &'a str {
    match settings(machine, unit, name)[..] {
        [value] => value,
        ref other => panic!("{unit}: {name}: {other:?}"),
    }
}

/// The arguments of `ExecStart=`, split by the quoting rules of systemd.service(5).
fn arguments(machine: &Value, unit: &str) -> Vec<String> {
    let (mut words, mut rest) = (Vec::new(), setting(machine, unit, "ExecStart"));
    while !rest.is_empty() {
        let word = if rest.starts_with('"') {
            let mut words = serde_json::Deserializer::from_str(rest).into_iter::<String>();
            let word = words.next().unwrap().unwrap();
            rest = &rest[words.byte_offset()..];
            word.replace("%%", "%").replace("$$", "$")
        } else {
            let (word, after) = rest.split_once(' ').unwrap_or((rest, ""));
            rest = after;
            word.to_owned()
        };
        rest = rest.trim_start_matches(' ');
        words.push(word);
    }
    words
}

fn has_flag(machine: &Value, flag: &str) -> bool {
    arguments(machine, "peerix.service").iter().any(|argument| argument == flag)
}

/// Name and default of each option in the README of the original peerix.
fn original_options() -> Vec<(String, Value)> {
    let tables =
        std::fs::read_to_string(Path::new(ROOT).join("tests/module/original-options.md")).unwrap();
    let rows = tables.lines().filter(|line| line.starts_with("| `services."));
    rows.map(|row| {
        let cells: Vec<&str> =
            row.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        let default = serde_json::from_str(cells[2]).unwrap_or_else(|_| json!(cells[2]));
        (cells[0].to_owned(), default)
    })
    .collect()
}

#[test]
fn original_options_keep_name_type_and_default() {
    let types: BTreeMap<&str, &str> = [
        ("enable", "bool"),
        ("openFirewall", "bool"),
        ("port", "port"),
        ("mode", r#"enum ["lan","wan","both"]"#),
        ("user", "either str int"),
        ("group", "either str int"),
        ("privateKeyFile", "nullOr path"),
        ("publicKeyFile", "nullOr path"),
        ("publicKey", "nullOr str"),
        ("globalCacheTTL", "nullOr ints.unsigned"),
        ("package", "package"),
        ("trackerUrl", "nullOr str"),
        ("announceAddr", "nullOr str"),
        ("peerId", "nullOr str"),
        ("upstreamCache", "str"),
        ("noVerify", "bool"),
        ("noFilter", "bool"),
        ("noDefaultFilters", "bool"),
        ("filterPatterns", "listOf str"),
        ("tracker.enable", "bool"),
        ("tracker.port", "port"),
        ("tracker.dbPath", "str"),
        ("tracker.openFirewall", "bool"),
    ]
    .into();
    let options = eval("(import ./tests/module/eval.nix).options");
    let options: BTreeMap<&str, &Value> = options
        .as_array()
        .unwrap()
        .iter()
        .map(|option| (option["name"].as_str().unwrap(), option))
        .collect();
    let original = original_options();
    assert_eq!(original.len(), types.len());
    for (name, default) in &original {
        let option = options.get(&**name).unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(option["type"], types[name.strip_prefix("services.peerix.").unwrap()], "{name}");
        // The stand-in for nixpkgs has the package at this path.
        let default =
            if *default == json!("pkgs.peerix") { json!("/usr/local") } else { default.clone() };
        assert_eq!(option["default"], default, "{name}");
    }
    for option in options.values() {
        assert!(option["description"].as_str().unwrap().len() > 20, "{option}");
    }
    let new: Vec<&str> = options
        .keys()
        .filter(|name| original.iter().all(|(old, _)| old != *name))
        .copied()
        .collect();
    let added = [
        "enableIPv6",
        "extraFlags",
        "friends",
        "interfaces",
        "lanNetworks",
        "mapPort",
        "peers",
        "priority",
        "settings",
        "share",
        "uploadLimit",
    ];
    assert_eq!(new, added.map(|name| format!("services.peerix.{name}")));
}

/// The README lists each option with its default.
#[test]
fn readme_lists_every_option_with_default() {
    let readme = std::fs::read_to_string(Path::new(ROOT).join("README.md")).unwrap();
    let mut there = BTreeMap::new();
    for row in readme.lines().filter(|line| line.starts_with("| `services.")) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        for name in cells[0].split(", ") {
            there.insert(name.trim_matches('`').to_owned(), cells[1].trim_matches('`').to_owned());
        }
    }
    let options = eval("(import ./tests/module/eval.nix).options");
    let options = options.as_array().unwrap().iter().map(|option| {
        let name = option["name"].as_str().unwrap().to_owned();
        let default = match &option["default"] {
            Value::Array(empty) if empty.is_empty() => "[ ]".to_owned(),
            Value::Object(empty) if empty.is_empty() => "{ }".to_owned(),
            Value::String(path) if path == "/usr/local" => "pkgs.peerix".to_owned(),
            other => other.to_string(),
        };
        (name, default)
    });
    assert_eq!(there, options.collect());
}

#[test]
fn disabled_module_adds_nothing() {
    let nothing = machine(
        "services.peerix = { port = 1; publicKeyFile = \"/k\"; tracker.dbPath = \"t.db\"; };",
    );
    assert_eq!(nothing["units"], json!({}));
    assert_eq!((&nothing["tcp"], &nothing["udp"]), (&json!([]), &json!([])));
    let conf = nothing["nixConf"].as_str().unwrap();
    assert!(!conf.contains("127.0.0.1") && !conf.contains("include"), "{conf}");
}

#[test]
fn default_module_adds_one_socket_one_service_and_one_substituter() {
    let machine = peerix("");
    let units: Vec<&String> = machine["units"].as_object().unwrap().keys().collect();
    assert_eq!(units, ["peerix.service", "peerix.socket"]);
    assert_eq!(machine["failed"], json!([]));
    assert_eq!((&machine["tcp"], &machine["udp"]), (&json!([12304]), &json!([12304])));
    let conf = machine["nixConf"].as_str().unwrap();
    assert!(conf.contains("\nsubstituters = https://cache.nixos.org/\n"), "replaced: {conf}");
    assert!(conf.contains("\nextra-substituters = http://127.0.0.1:12304\n"), "{conf}");
    assert!(!conf.contains("narinfo-cache") && !conf.contains("include"), "{conf}");

    for kind in ["ListenStream", "ListenDatagram"] {
        assert_eq!(settings(&machine, "peerix.socket", kind), ["0.0.0.0:12304"]);
    }
    assert_eq!(setting(&machine, "peerix.socket", "WantedBy"), "sockets.target");
    let service = |name| setting(&machine, "peerix.service", name);
    assert_eq!(
        [
            service("Type"),
            service("Restart"),
            service("DynamicUser"),
            service("User"),
            service("StateDirectory")
        ],
        ["notify", "on-failure", "true", "peerix", "peerix"]
    );
    assert!(service("WatchdogSec").parse::<u32>().unwrap() > 0);
    assert!(service("ExecStartPre").starts_with("+-/nix/"));
    assert_eq!(settings(&machine, "peerix.service", "Group"), [""; 0]);
    assert_eq!(
        arguments(&machine, "peerix.service"),
        [
            "/usr/local/bin/peerix",
            "--mode=lan",
            "--port=12304",
            "--priority=20",
            "--upstream-cache=https://cache.nixos.org",
        ]
    );
    // The socket survives a change of the service, and the service does not depend on nix-daemon.
    assert_eq!(machine["stopIfChanged"]["peerix"], json!(false));
    assert_eq!(service("Requires"), "peerix.socket");
}

#[test]
fn every_option_reaches_units_and_nix_conf() {
    let machine = peerix(
        r#"services.peerix = {
            port = 12399; mode = "both"; trackerUrl = "http://tracker:1"; announceAddr = "home:2"; peerId = "me";
            upstreamCache = "https://cache.example"; noVerify = true; noFilter = true; noDefaultFilters = true;
            filterPatterns = [ "*-a" "b*" ]; priority = 7; peers = [ "one" "two:3" ]; enableIPv6 = true;
            lanNetworks = [ "100.64.0.0/10" "fd7a::/48" ]; interfaces = [ "eth*" "!eth1" ];
            extraFlags = [ "--timeout=80" "--tracker-url=http://second:1" ];
            privateKeyFile = "/run/secrets/50 %.key"; package = "/other"; publicKey = "k-1:dw6gRsgENbg3ZRarDaIEP6t3wwkl5ML26Gov7r1VLrA="; globalCacheTTL = 60;
            settings = { timeout = 90; lan = [ "10.9.0.0/16" ]; verbose = true; bind = null; };
        };"#,
    );
    for flag in [
        "--port=12399",
        "--mode=both",
        "--priority=7",
        "--private-key=%d/private-key",
        "--timeout=90",
        "--lan=10.9.0.0/16",
        "--verbose",
        "--peer=one",
        "--peer=two:3",
        "--lan=100.64.0.0/10",
        "--lan=fd7a::/48",
        "--interface=eth*",
        "--interface=!eth1",
        "--tracker-url=http://tracker:1",
        "--announce-addr=home:2",
        "--peer-id=me",
        "--upstream-cache=https://cache.example",
        "--no-verify",
        "--no-filter",
        "--no-default-filters",
        "--filter-patterns=*-a",
        "--filter-patterns=b*",
        "--timeout=80",
        "--tracker-url=http://second:1",
    ] {
        assert!(has_flag(&machine, flag), "no {flag}");
    }
    // An active socket keeps its addresses during a switch of the configuration, so other addresses
    // need a socket of another name.
    let socket = "peerix-12399-ipv6.socket";
    assert_eq!(settings(&machine, socket, "ListenStream"), ["0.0.0.0:12399", "[::]:12399"]);
    assert_eq!(setting(&machine, socket, "Service"), "peerix.service");
    assert_eq!(setting(&machine, "peerix.service", "Requires"), socket);
    assert_eq!(
        setting(&machine, "peerix.service", "LoadCredential"),
        "private-key:/run/secrets/50 %%.key"
    );
    assert_eq!(setting(&machine, "peerix.service", "SetCredential"), "private-key:missing");
    assert_eq!(setting(&machine, "peerix-key.path", "PathChanged"), "/run/secrets/50 %%.key");
    assert_eq!(
        setting(&machine, "peerix-key.service", "ExecStart"),
        "/usr/bin/systemctl try-restart peerix.service"
    );
    assert_eq!(machine["failed"], json!([]));
    assert_eq!(arguments(&machine, "peerix.service")[0], "/other/bin/peerix");
    let conf = machine["nixConf"].as_str().unwrap();
    for line in [
        "extra-substituters = http://127.0.0.1:12399\n",
        "extra-trusted-public-keys = k-1:dw6gRsgENbg3ZRarDaIEP6t3wwkl5ML26Gov7r1VLrA=\n",
        "narinfo-cache-positive-ttl = 60\n",
        "narinfo-cache-negative-ttl = 60\n",
    ] {
        assert!(conf.contains(line), "no {line} in {conf}");
    }
    assert_eq!(machine["tcp"], json!([12399]));
    assert_eq!(peerix("services.peerix.openFirewall = false;")["tcp"], json!([]));
}

#[test]
fn friends_and_sharing_options_become_flags() {
    let key = "ed25519:BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";
    let machine = peerix(&format!(
        r#"services.peerix = {{
            friends = [ "laptop={key}" "home={key}@home.example:4000,sign=home-1:AAAA" ];
            share = "friends"; uploadLimit = "2M"; mapPort = true;
        }};"#
    ));
    for flag in [
        &format!("--friend=laptop={key}"),
        &format!("--friend=home={key}@home.example:4000,sign=home-1:AAAA"),
        "--share=friends",
        "--upload-limit=2M",
        "--map-port",
    ] {
        assert!(has_flag(&machine, flag), "no {flag}");
    }
    let conf = machine["nixConf"].as_str().unwrap();
    assert!(conf.contains("extra-trusted-public-keys = home-1:AAAA\n"), "{conf}");
    assert_eq!((&machine["tcp"], &machine["udp"]), (&json!([12304, 12306]), &json!([12304])));
    assert!(!has_flag(&peerix(""), "--share=all"), "what is the default needs no flag");
}

#[test]
fn program_accepts_every_flag_of_module() {
    let machine = peerix(
        r#"services.peerix = {
            mode = "wan"; trackerUrl = "http://t:1"; announceAddr = "home:2"; peerId = "-me"; noVerify = true; noFilter = true;
            noDefaultFilters = true; filterPatterns = [ "-*" "--port" ]; peers = [ "one" ]; privateKeyFile = "/k"; publicKeyFile = "/p"; enableIPv6 = true;
            lanNetworks = [ "10.8.0.0/16" ]; interfaces = [ "!eth1" ]; share = "nobody"; uploadLimit = "64K"; mapPort = true;
            friends = [ "a=ed25519:BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=@[::1]:1" ];
        };"#,
    );
    // The daemon fails at the missing database, after it has parsed all flags.
    let output = Command::new(env!("CARGO_BIN_EXE_peerix"))
        .args(&arguments(&machine, "peerix.service")[1..])
        .args(["--port=0", "--db=/nonexistent/db.sqlite"])
        .env_remove("NIX_SECRET_KEY_FILE")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("peerix: nix database /nonexistent/db.sqlite: not found"), "{said}");
}

#[test]
fn special_characters_reach_program_unchanged() {
    let odd = "a \"b\" 'c' %i %% $HOME ${HOME} \\ \\n ; # *? \t ü -";
    let nix =
        odd.replace('\\', "\\\\").replace('"', "\\\"").replace("${", "\\${").replace('\t', "\\t");
    let machine = peerix(&format!(
        "services.peerix = {{ peerId = \"{nix}\"; announceAddr = \"{nix}\"; trackerUrl = \"{nix}\"; filterPatterns = [ \"{nix}\" ];
          extraFlags = [ \"{nix}\" ]; }};"
    ));
    for flag in ["--peer-id=", "--announce-addr=", "--tracker-url=", "--filter-patterns=", ""] {
        assert!(has_flag(&machine, &format!("{flag}{odd}")), "{flag}");
    }
    let text = machine["units"]["peerix.service"].as_str().unwrap();
    assert!(text.lines().filter(|line| line.starts_with("ExecStart=")).count() == 1);
}

#[test]
fn invalid_options_are_refused_with_advice() {
    for (config, names) in [
        (r#"mode = "wan";"#, &["\"wan\"", "services.peerix.trackerUrl"][..]),
        (r#"mode = "both";"#, &["services.peerix.trackerUrl"]),
        (r#"mode = "both"; trackerUrl = "";"#, &["services.peerix.trackerUrl"]),
        // These directories would be handed to the tracker, or have no owner.
        (
            r#"tracker = { enable = true; dbPath = "/var/lib/tracker.db"; };"#,
            &["tracker.dbPath", "/var/lib/tracker.db"],
        ),
        (r#"tracker = { enable = true; dbPath = "/tracker.db"; };"#, &["tracker.dbPath"]),
        (
            r#"tracker = { enable = true; dbPath = "tracker.db"; };"#,
            &["tracker.dbPath", "absolute"],
        ),
        (
            r#"tracker = { enable = true; dbPath = "/data/my dir/t.db"; };"#,
            &["tracker.dbPath", "plain"],
        ),
        (r#"tracker = { enable = true; dbPath = "/data/../etc/x/t.db"; };"#, &["tracker.dbPath"]),
        (r#"publicKey = "a:b";"#, &["services.peerix.publicKey", "a:b", "no public key"]),
        (r#"publicKey = "myhost-1";"#, &["services.peerix.publicKey", "myhost-1"]),
        (
            r#"mode = "wan"; trackerUrl = "tracker:12305";"#,
            &["tracker-url", "tracker:12305", "http://"],
        ),
        (
            r#"upstreamCache = "cache.nixos.org";"#,
            &["upstream-cache", "cache.nixos.org", "https://"],
        ),
        (r#"settings.tracker-url = [ "http://a" "b" ];"#, &["tracker-url", "(b)"]),
        ("tracker = { enable = true; port = 12304; };", &["services.peerix.tracker.port", "12304"]),
        ("settings.port = 1;", &["services.peerix.settings.port", "services.peerix.port"]),
        (r#"user = "ghost";"#, &["services.peerix.user", "ghost", "users.users.ghost"]),
        (
            "privateKeyFile = builtins.storeDir + \"/abc-key\";",
            &["privateKeyFile", "every user", "/etc/nix/peerix.sec"],
        ),
    ] {
        let failed = peerix(&format!("services.peerix = {{ {config} }};"))["failed"].clone();
        let [message] = &failed.as_array().unwrap()[..] else { panic!("{config}: {failed}") };
        for name in names {
            assert!(message.as_str().unwrap().contains(name), "{config}: no {name} in {message}");
        }
    }
    // The original accepts both options together.
    let both = r#"services.peerix = { publicKey = "a-1:dw6gRsgENbg3ZRarDaIEP6t3wwkl5ML26Gov7r1VLrA="; publicKeyFile = "/c"; };"#;
    let both = peerix(both);
    assert_eq!(both["failed"], json!([]));
    let conf = both["nixConf"].as_str().unwrap();
    assert!(
        conf.contains("extra-trusted-public-keys = a-1:")
            && conf.contains("!include /run/peerix-public-key"),
        "{conf}"
    );
    // An empty option counts as unset.
    assert!(
        !peerix("services.peerix.peerId = \"\";")["units"]["peerix.service"]
            .as_str()
            .unwrap()
            .contains("peer-id")
    );
    // A path whose name only begins like the store directory is not in the store.
    let beside = peerix("services.peerix.privateKeyFile = builtins.storeDir + \"-keys/k\";");
    assert_eq!(beside["failed"], json!([]));
    // A path of a flake is in the store and world-readable. A path beside configuration.nix is not
    // copied to the store.
    let beside = peerix("services.peerix.privateKeyFile = ./Cargo.toml;");
    assert_eq!(beside["failed"], json!([]));
    assert_eq!(
        setting(&beside, "peerix.service", "LoadCredential"),
        format!("private-key:{ROOT}/Cargo.toml")
    );

    for (config, names) in [
        ("port = 65536;", "services.peerix.port: 65536 is not of type port"),
        ("port = \"12304\";", "services.peerix.port"),
        ("mode = \"internet\";", "services.peerix.mode"),
        ("filterPatterns = \"*\";", "services.peerix.filterPatterns"),
        ("lanNetworks = \"10.8.0.0/16\";", "services.peerix.lanNetworks"),
        ("interfaces = \"eth0\";", "services.peerix.interfaces"),
        ("globalCacheTTL = -1;", "services.peerix.globalCacheTTL"),
        ("privateKeyFile = \"key\";", "services.peerix.privateKeyFile"),
        ("tracker = { enable = true; port = -1; };", "services.peerix.tracker.port"),
    ] {
        let said = refused(&format!("services.peerix = {{ enable = true; {config} }};"));
        assert!(said.contains(names), "{config}: {said}");
    }
}

#[test]
fn public_key_file_is_read_by_nix_not_by_evaluation() {
    let machine = peerix("services.peerix.publicKeyFile = \"/run/secrets/50 %.pub\";");
    let unit = "peerix-public-key.service";
    assert_eq!(setting(&machine, unit, "LoadCredential"), "public-key:/run/secrets/50 %%.pub");
    assert!(
        machine["nixConf"]
            .as_str()
            .unwrap()
            .contains("\n!include /run/peerix-public-key/nix.conf\n")
    );
    // The unit runs before nix-daemon starts, writes a world-readable file, and has no
    // capabilities.
    assert_eq!(setting(&machine, unit, "Before"), "nix-daemon.service peerix.service");
    assert_eq!(setting(&machine, unit, "PartOf"), "nix-daemon.service");
    assert_eq!(setting(&machine, unit, "WantedBy"), "multi-user.target nix-daemon.service");
    assert_eq!(setting(&machine, unit, "RuntimeDirectoryMode"), "0755");
    assert_eq!(setting(&machine, unit, "UMask"), "0022");
    assert_eq!(setting(&machine, unit, "RemainAfterExit"), "true");
    assert_eq!(setting(&machine, unit, "CapabilityBoundingSet"), "");
    // nix-daemon reads its configuration at its start, so another file requires a restart.
    assert_eq!(machine["restartTriggers"]["nix-daemon"], json!(["/run/secrets/50 %.pub"]));
    let without = &peerix("")["restartTriggers"];
    assert!(without.is_object() && without["nix-daemon"].is_null());
    // peerix reads the keys from nix.conf. A credential of its own would keep it from starting
    // while the file is missing.
    assert!(!machine["units"]["peerix.service"].as_str().unwrap().contains("public-key"));
    assert_eq!(settings(&machine, "peerix.service", "LoadCredential"), [""; 0]);

    // The unit's script on a file that tries to inject another setting.
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("public-key");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("public-key"), "a-1:AAAA\r\nallowed-users = *\n\nb-1:BBBB").unwrap();
    let script = machine["scripts"]["peerix-public-key"].as_str().unwrap();
    let script = script.replace("/run/peerix-public-key", dir.to_str().unwrap());
    let status = Command::new("bash")
        .args(["-c", &script])
        .env("CREDENTIALS_DIRECTORY", &dir)
        .status()
        .unwrap();
    assert!(status.success());
    let keys = "a-1:AAAA allowed-users = * b-1:BBBB\n";
    let conf = std::fs::read_to_string(dir.join("nix.conf")).unwrap();
    assert_eq!(conf, format!("extra-trusted-public-keys = {keys}"));
}

/// A path in the configuration must become a store path. Otherwise the file is missing on the
/// machine to which the system is copied.
#[test]
fn public_key_file_beside_configuration_is_copied_with_system() {
    let unit = eval_with_store(
        "let unit = ((import ./tests/module/eval.nix).module { services.peerix = { enable = true;
           publicKeyFile = ./tests/data/public-key; }; }).units.\"peerix-public-key.service\";
         in { text = builtins.unsafeDiscardStringContext unit; carried = builtins.attrNames (builtins.getContext unit); }",
    );
    let carried = unit["carried"][0].as_str().expect("it refers to a store path");
    assert!(
        unit["text"].as_str().unwrap().contains(&format!("LoadCredential=public-key:{carried}\n")),
        "{unit}"
    );
}

#[test]
fn module_imported_twice_applies_once() {
    let expression = "(import ./tests/module/eval.nix).twice { services.peerix = { enable = true; peers = [ \"a\" ]; }; }";
    let machine = eval(expression);
    assert_eq!(settings(&machine, "peerix.socket", "ListenStream"), ["0.0.0.0:12304"]);
    assert_eq!(
        arguments(&machine, "peerix.service").iter().filter(|flag| *flag == "--peer=a").count(),
        1
    );
}

#[test]
fn no_proxy_includes_loopback() {
    let with = |proxy: &str| peerix(&format!("networking.proxy = {{ {proxy} }};"));
    assert_eq!(peerix("")["noProxy"], json!(null));
    assert_eq!(
        with(r#"default = "http://proxy:3128";"#)["noProxy"],
        json!("127.0.0.1,localhost,::1")
    );
    for (no_proxy, warnings) in
        [("localhost", 1), ("example.org,127.0.0.1", 0), ("127.0.0.0/8", 0), ("127.0.0.10", 1)]
    {
        let machine = with(&format!(r#"httpProxy = "http://proxy:3128"; noProxy = "{no_proxy}";"#));
        assert_eq!(machine["noProxy"], json!(no_proxy));
        assert_eq!(machine["warnings"].as_array().unwrap().len(), warnings, "{no_proxy}");
    }
}

/// Without the overlay, nixpkgs has no package for peerix.
#[test]
fn package_is_built_without_overlay() {
    let built = eval("toString (import ./tests/module/eval.nix).fallback");
    assert_eq!(built, json!(format!("{ROOT}/nix/package.nix")));
}

#[test]
fn service_runs_as_configured_user() {
    let chosen = peerix(
        "services.peerix = { user = \"cache\"; group = \"nogroup\"; }; users.users.cache.isSystemUser = true;",
    );
    assert_eq!(chosen["failed"], json!([]));
    let service = |name| settings(&chosen, "peerix.service", name);
    assert_eq!(
        (service("User"), service("Group"), service("DynamicUser")),
        (vec!["cache"], vec!["nogroup"], vec![])
    );
    let number = peerix("services.peerix.user = 1000;");
    assert_eq!(setting(&number, "peerix.service", "User"), "1000");
    assert_eq!(settings(&number, "peerix.service", "Group"), [""; 0]);
}

#[test]
fn tracker_without_daemon_is_one_service() {
    let tracker = machine("services.peerix.tracker.enable = true;");
    let units: Vec<&String> = tracker["units"].as_object().unwrap().keys().collect();
    assert_eq!(units, ["peerix-tracker.service"]);
    assert_eq!((&tracker["tcp"], &tracker["udp"]), (&json!([12305]), &json!([])));
    assert!(!tracker["nixConf"].as_str().unwrap().contains("127.0.0.1"));
    let unit = "peerix-tracker.service";
    assert_eq!(
        arguments(&tracker, unit),
        [
            "/usr/local/bin/peerix-tracker",
            "--port=12305",
            "--db-path=/var/lib/peerix-tracker/tracker.db"
        ]
    );
    assert_eq!(setting(&tracker, unit, "StateDirectory"), "peerix-tracker");
    assert_eq!(setting(&tracker, unit, "DynamicUser"), "true");

    // systemd creates no directory outside /var/lib, so tmpfiles does, for a static user.
    let config = "enable = true; port = 1; openFirewall = false; dbPath = \"/data/tracker/t.db\";";
    let elsewhere = machine(&format!("services.peerix.tracker = {{ {config} }};"));
    assert_eq!(elsewhere["tcp"], json!([]));
    assert_eq!(setting(&elsewhere, unit, "ReadWritePaths"), "/data/tracker");
    assert_eq!(settings(&elsewhere, unit, "DynamicUser"), [""; 0]);
    assert_eq!(
        elsewhere["tmpfiles"],
        json!(["d /data/tracker :0700 :peerix-tracker :peerix-tracker -"])
    );
    // The directory of another service stays with its owner.
    let beside = machine(
        "services.peerix.tracker = { enable = true; dbPath = \"/var/lib/postgresql/t.db\"; };",
    );
    assert_eq!(settings(&beside, unit, "StateDirectory"), [""; 0]);
    assert_eq!(elsewhere["users"], json!(["peerix-tracker"]));
}

/// The settings of nixpkgs' harmonia module, at least.
#[test]
fn both_services_are_sandboxed() {
    let machine = peerix("services.peerix.tracker.enable = true;");
    for unit in ["peerix.service", "peerix-tracker.service"] {
        for (name, value) in [
            ("CapabilityBoundingSet", ""),
            ("NoNewPrivileges", "true"),
            ("PrivateUsers", "true"),
            ("PrivateDevices", "true"),
            ("PrivateTmp", "true"),
            ("PrivateMounts", "true"),
            ("ProtectSystem", "strict"),
            ("ProtectHome", "true"),
            ("ProtectKernelModules", "true"),
            ("ProtectKernelTunables", "true"),
            ("ProtectKernelLogs", "true"),
            ("ProtectControlGroups", "true"),
            ("ProtectHostname", "true"),
            ("ProtectClock", "true"),
            ("ProtectProc", "invisible"),
            ("ProcSubset", "pid"),
            ("RestrictNamespaces", "true"),
            ("RestrictRealtime", "true"),
            ("LockPersonality", "true"),
            ("MemoryDenyWriteExecute", "true"),
            ("SystemCallArchitectures", "native"),
            ("UMask", "0077"),
        ] {
            assert_eq!(setting(&machine, unit, name), value, "{unit}: {name}");
        }
        assert_eq!(
            settings(&machine, unit, "SystemCallFilter"),
            ["@system-service", "~@privileged @resources"]
        );
    }
    assert!(
        !settings(&machine, "peerix-tracker.service", "RestrictAddressFamilies")
            .contains(&"AF_NETLINK")
    );
}

/// The README names only existing drop-ins. The drop-in for the key lets the daemon start without
/// the key.
#[test]
fn drop_ins_of_readme_exist_and_tolerate_missing_key() {
    let read = |name: &str| std::fs::read_to_string(Path::new(ROOT).join(name)).unwrap();
    let readme = read("README.md");
    for line in
        readme.lines().filter(|line| line.starts_with("    # ") && line.contains("contrib/"))
    {
        let files = line
            .split_whitespace()
            .filter(|word| word.starts_with("contrib/") && !word.contains('*'));
        files.for_each(|file| assert!(Path::new(ROOT).join(file).exists(), "{line}"));
    }
    let key = read("contrib/peerix.service.d/key.conf");
    for line in [
        "LoadCredential=private-key:/etc/nix/peerix.sec\n",
        "SetCredential=private-key:missing\n",
        "=%d/private-key\n",
    ] {
        assert!(key.contains(line), "{line}");
    }
    assert!(
        readme.contains("contrib/peerix.service.d/key.conf")
            && readme.contains("/etc/nix/peerix.sec /etc/nix/peerix.pub")
    );
    // peerix reads trusted keys from nix.conf, so the unit needs no flag for them.
    assert!(!read("contrib/systemd/peerix.service").contains("trusted-public-key"));
}

/// `contrib/` has the units of the module, for systems other than NixOS. `PEERIX_UPDATE=1` writes
/// them.
#[test]
fn contrib_units_match_module() {
    let machine = peerix("services.peerix.tracker.enable = true;");
    let contrib = Path::new(ROOT).join("contrib");
    let lines = machine["nixConf"].as_str().unwrap().lines();
    let conf: String =
        lines.filter(|line| line.contains("127.0.0.1")).map(|line| format!("{line}\n")).collect();
    // A leading newline, because the file it is appended to may lack its last one.
    let conf = format!("\n{conf}");
    let mut files: BTreeMap<String, String> = [("nix.conf".to_owned(), conf)].into();
    for (name, text) in machine["units"].as_object().unwrap() {
        files.insert(format!("systemd/{name}"), text.as_str().unwrap().to_owned());
    }
    for (name, text) in &files {
        let path = contrib.join(name);
        if std::env::var_os("PEERIX_UPDATE").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
        }
        let there = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(
            there, *text,
            "contrib/{name}: PEERIX_UPDATE=1 cargo test --test integration module writes it anew"
        );
    }
    let units = std::fs::read_dir(contrib.join("systemd")).unwrap().count();
    assert_eq!(units, files.len() - 1, "contrib/systemd has units that the module does not make");
}

/// The machines of the VM tests are valid, and both ways to run the tests use the same steps.
#[test]
fn vm_test_machines_are_valid_and_share_steps() {
    for (test, names) in [("lan", 3), ("wan", 3)] {
        let machines =
            eval(&format!("(import ./tests/module/eval.nix).machines ./nix/tests/{test}.nix"));
        let machines = machines.as_object().unwrap();
        assert_eq!(machines.len(), names);
        for (name, machine) in machines {
            assert_eq!(machine["failed"], json!([]), "{test}: {name}");
            assert!(!machine["units"].as_object().unwrap().is_empty());
        }
        let steps =
            eval(&format!("(import ./nix/tests/{test}.nix {{ peerix = \"/p\"; }}).testScript"));
        let parts = ["common", test].map(|part| {
            std::fs::read_to_string(Path::new(ROOT).join(format!("tests/vm/{part}.py")))
        });
        assert_eq!(steps, parts.map(Result::unwrap).concat());
    }
}
