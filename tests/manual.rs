//! Man pages and shell completions agree with `--help`. The tests generate them from the help and
//! compare them with the files in `contrib/`. After a change of the help, write them with
//! `PEERIX_WRITE=1 cargo test --test integration manual`.
use crate::common::{daemon, tracker};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A flag or command in the help: `--port N`, or `why PATH`.
#[derive(Debug, Default)]
struct Item {
    short: Option<char>,
    name: String,
    /// Placeholder of the value; empty for a flag without one.
    value: String,
    text: String,
}

impl Item {
    fn is_command(&self) -> bool {
        !self.name.starts_with("--")
    }

    fn is_file(&self) -> bool {
        ["FILE", "DIR", "PATH"].contains(&self.value.as_str())
    }

    /// The words of a value such as `lan|wan|both`, separated by spaces.
    fn choices(&self) -> Option<String> {
        self.value.contains('|').then(|| self.value.replace('|', " "))
    }

    fn is_repeatable(&self) -> bool {
        self.text.contains("repeatable") || self.text.contains("several")
    }
}

/// A program's name, and the flags and commands in its help.
struct Help {
    program: &'static str,
    items: Vec<Item>,
}

impl Help {
    fn of(program: &'static str, binary: &Path) -> Help {
        let output = Command::new(binary).arg("--help").stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success());
        let mut items: Vec<Item> = Vec::new();
        for line in String::from_utf8(output.stdout).unwrap().lines() {
            if let Some(more) = line.strip_prefix(&" ".repeat(20)) {
                let item = items.last_mut().expect("what it goes on with");
                let _ = write!(item.text, " {}", more.trim_start());
            } else if let Some(line) = line.strip_prefix("  ").filter(|line| !line.starts_with(' '))
            {
                let (head, text) = line.split_once("  ").unwrap_or((line, ""));
                // Before the text of a flag with a long value there is only one space.
                let (head, text) = match head.split(' ').nth(2) {
                    Some(_) if head.starts_with("--") => head
                        .match_indices(' ')
                        .nth(1)
                        .map(|(at, _)| head.split_at(at))
                        .map_or((head, text), |(flag, rest)| {
                            (flag, if text.is_empty() { rest } else { text })
                        }),
                    _ => (head, text),
                };
                let (short, head) =
                    match head.strip_prefix('-').filter(|rest| !rest.starts_with('-')) {
                        Some(rest) => (rest.chars().next(), rest[1..].trim_start_matches(", ")),
                        None => (None, head),
                    };
                let (name, value) = head.split_once(' ').unwrap_or((head, ""));
                let is_item = name.starts_with("--")
                    || name.chars().all(|c| c.is_ascii_lowercase()) && !text.is_empty();
                if is_item {
                    items.push(Item {
                        short,
                        name: name.into(),
                        value: value.into(),
                        text: text.trim().into(),
                    });
                }
            }
        }
        for item in &mut items {
            item.text = item.text.split_whitespace().collect::<Vec<_>>().join(" ");
        }
        Help { program, items }
    }

    fn both() -> [Help; 2] {
        let tracker = tracker::binary().expect("cargo built it");
        [Help::of("peerix", daemon::binary()), Help::of("peerix-tracker", tracker)]
    }

    fn flags(&self) -> impl Iterator<Item = &Item> {
        self.items.iter().filter(|item| !item.is_command())
    }

    fn commands(&self) -> impl Iterator<Item = &Item> {
        self.items.iter().filter(|item| item.is_command())
    }
}

fn contrib(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib").join(name)
}

/// Compares the text with a file in `contrib/`, and writes it first if `PEERIX_WRITE` is set.
fn assert_contrib_file_matches(name: &str, text: &str) {
    let file = contrib(name);
    let mut there = fs::read_to_string(&file).unwrap_or_default();
    if there != text && std::env::var_os("PEERIX_WRITE").is_some() {
        fs::write(&file, text).unwrap();
        text.clone_into(&mut there);
    }
    assert!(
        there == text,
        "contrib/{name} is not what --help says: PEERIX_WRITE=1 cargo test --test integration manual"
    );
}

#[test]
fn help_parser_finds_every_flag() {
    let [peerix, tracker] = Help::both();
    let names = |help: &Help| help.items.iter().map(|item| item.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&peerix)[..6], ["status", "peers", "why", "doctor", "identity", "--json"]);
    let flags = [
        "--port",
        "--host",
        "--db-path",
        "--filter-memory",
        "--proxy",
        "--verbose",
        "--help",
        "--version",
    ];
    assert_eq!(names(&tracker), flags);
    let source =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli.rs")).unwrap();
    // Every flag of the parser, in both forms in which the source matches flags.
    let (parser, _) = source.split_once("#[cfg(test)]").unwrap();
    let (_, parser) = parser.split_once("pub fn parse(").unwrap();
    let mut known: Vec<String> = Vec::new();
    for line in parser.lines().map(str::trim) {
        let long = line.split_once("Long(\"").map(|(_, rest)| rest);
        let matched = line.strip_prefix('"').filter(|_| line.contains("\" =>"));
        known.extend(
            long.or(matched)
                .and_then(|rest| rest.split('"').next())
                .map(|name| format!("--{name}")),
        );
    }
    let mut told: Vec<String> = peerix.flags().map(|item| item.name.clone()).collect();
    known.sort();
    told.sort();
    assert!(known.len() > 20);
    assert_eq!(known, told);
    for item in peerix.items.iter().filter(|item| item.name != "--help" && item.name != "--version")
    {
        assert!(item.text.len() > 5 || !item.value.is_empty(), "{item:?}");
    }
}

/// Escapes text for troff.
fn roff(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

#[test]
fn man_pages_match_help() {
    for help in Help::both() {
        let name = format!("man/{}.8", help.program);
        let page = fs::read_to_string(contrib(&name)).unwrap();
        let mut made = String::new();
        let mut inside = false;
        for line in page.lines() {
            if line == ".\\\" end" {
                inside = false;
            }
            if !inside {
                made += &format!("{line}\n");
            }
            let Some(what) = line.strip_prefix(".\\\" from --help: ") else { continue };
            inside = true;
            for item in help.items.iter().filter(|item| item.is_command() == (what == "commands")) {
                let short = item.short.map(|short| format!("\\-{short}, ")).unwrap_or_default();
                let value = if item.value.is_empty() {
                    String::new()
                } else {
                    format!(" \\fI{}", roff(&item.value))
                };
                made += &format!(
                    ".TP\n\\fB{short}{}{value}\\fR\n{}\n",
                    roff(&item.name),
                    roff(&item.text)
                );
            }
        }
        assert_contrib_file_matches(&name, &made);
        // mandoc must report nothing. A missing date is fine: the pages belong to no distribution.
        let lint = Command::new("mandoc")
            .args(["-T", "lint", "-W", "style"])
            .arg(contrib(&name))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&lint.stdout).into_owned();
        let bad: Vec<&str> = said
            .lines()
            .filter(|l| !l.contains("missing date") && !l.contains("longer than 80"))
            .collect();
        assert!(bad.is_empty(), "{bad:#?}");
    }
}

const NOTE: &str = "# Made of what --help says by tests/manual.rs.\n";

fn bash(help: &Help) -> String {
    let function = format!("_{}", help.program.replace('-', "_"));
    let names = |items: Vec<&Item>| {
        items.iter().map(|item| item.name.as_str()).collect::<Vec<_>>().join(" ")
    };
    let mut out = format!(
        "{NOTE}{function}() {{\n    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD - 1]}}\n    \
         COMPREPLY=()\n    case $prev in\n"
    );
    for item in help.flags().filter(|item| !item.value.is_empty()) {
        let reply = match (item.choices(), item.value.as_str()) {
            (Some(words), _) => {
                format!("mapfile -t COMPREPLY < <(compgen -W '{words}' -- \"$cur\"); ")
            }
            (_, "FILE") => "mapfile -t COMPREPLY < <(compgen -f -- \"$cur\"); ".into(),
            (_, "DIR") => "mapfile -t COMPREPLY < <(compgen -d -- \"$cur\"); ".into(),
            _ => String::new(),
        };
        out += &format!("    {}) {reply}return ;;\n", item.name);
    }
    let flags = names(help.flags().collect());
    out += &format!(
        "    esac\n    if [[ $cur == -* ]]; then\n        mapfile -t COMPREPLY < <(compgen -W '{flags}' -- \"$cur\")\n"
    );
    let commands = names(help.commands().collect());
    if !commands.is_empty() {
        out += &format!(
            "    elif ((COMP_CWORD == 1)); then\n        mapfile -t COMPREPLY < <(compgen -W '{commands}' -- \"$cur\")\n    \
             elif [[ ${{COMP_WORDS[1]}} == why ]]; then\n        mapfile -t COMPREPLY < <(compgen -f -- \"${{cur:-/nix/store/}}\")\n"
        );
    }
    out + &format!("    fi\n}}\ncomplete -o filenames -F {function} {}\n", help.program)
}

fn zsh(help: &Help) -> String {
    let quote = |text: &str| {
        text.replace('\'', "'\\''").replace('[', "\\[").replace(']', "\\]").replace(':', "\\:")
    };
    let mut out = format!("#compdef {}\n{NOTE}_arguments -s \\\n", help.program);
    for item in help.flags() {
        let action = match (item.choices(), item.value.as_str()) {
            (Some(words), _) => format!(":mode:({words})"),
            (_, "FILE") => ":file:_files".into(),
            (_, "DIR") => ":directory:_files -/".into(),
            (_, "") => String::new(),
            (_, value) => format!(":{}:", quote(value)),
        };
        let star = if item.is_repeatable() { "*" } else { "" };
        let text = quote(&item.text);
        out += &format!("    '{star}{}[{text}]{action}' \\\n", item.name);
        out += &item.short.map(|short| format!("    '-{short}[{text}]' \\\n")).unwrap_or_default();
    }
    let commands: Vec<String> = help.commands().map(|item| item.name.clone()).collect();
    if !commands.is_empty() {
        out += &format!(
            "    '1::command:({})' \\\n    '2::path:_files -W /nix/store' \\\n",
            commands.join(" ")
        );
    }
    out.trim_end_matches(" \\\n").to_owned() + "\n"
}

fn fish(help: &Help) -> String {
    let quote = |text: &str| text.replace('\\', "\\\\").replace('\'', "\\'");
    let mut out = format!("{NOTE}complete -c {} -f\n", help.program);
    for item in &help.items {
        let text = quote(&item.text);
        let words = item.choices().map(|words| format!(" -a '{words}'")).unwrap_or_default();
        let (value, words) = match item.value.as_str() {
            "" => ("", String::new()),
            _ if item.is_file() => (" -r -F", String::new()),
            _ => (" -x", words),
        };
        out += &match item.is_command() {
            true => format!(
                "complete -c {} -n __fish_is_first_arg -a {} -d '{text}'\n",
                help.program, item.name
            ),
            false => {
                let short = item.short.map(|short| format!(" -s {short}")).unwrap_or_default();
                let long = item.name.trim_start_matches('-');
                format!("complete -c {}{short} -l {long}{value}{words} -d '{text}'\n", help.program)
            }
        };
    }
    if help.commands().next().is_some() {
        out += &format!("complete -c {} -n '__fish_seen_subcommand_from why' -F\n", help.program);
    }
    out
}

#[test]
fn completions_match_help() {
    for help in Help::both() {
        assert_contrib_file_matches(&format!("completions/{}.bash", help.program), &bash(&help));
        assert_contrib_file_matches(&format!("completions/_{}", help.program), &zsh(&help));
        assert_contrib_file_matches(&format!("completions/{}.fish", help.program), &fish(&help));
    }
}

/// Runs a script in a shell and returns what it prints; panics if it writes to stderr.
fn shell(shell: &str, script: &str, args: &[&str]) -> String {
    let mut command = Command::new(shell);
    command
        .args(["-c", script])
        .args(args)
        .env("HOME", crate::common::directory())
        .env("TERM", "dumb")
        .stdin(Stdio::null());
    let output = command.output().unwrap_or_else(|e| panic!("{shell}: {e}"));
    assert!(output.stderr.is_empty(), "{shell}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Lines to complete, words that must be offered, and words that must not.
const CASES: [(&str, &[&str], &[&str]); 6] = [
    ("peerix ", &["status", "peers", "why", "doctor"], &["--port"]),
    ("peerix d", &["doctor"], &["status"]),
    ("peerix --tr", &["--tracker-url", "--trusted-public-key"], &["--port"]),
    ("peerix --mode ", &["lan", "wan", "both"], &["status"]),
    ("peerix status --j", &["--json"], &["--port"]),
    ("peerix-tracker --d", &["--db-path"], &["--port", "--mode"]),
];

fn check(shell: &str, answers: impl Fn(&str, &Path) -> String) {
    for (line, wanted, unwanted) in CASES {
        let program = line.split(' ').next().unwrap();
        let file = match shell {
            "zsh" => format!("completions/_{program}"),
            _ => format!("completions/{program}.{shell}"),
        };
        let given = answers(line, &contrib(&file));
        let words: Vec<&str> = given.split_whitespace().collect();
        for word in wanted {
            assert!(words.contains(word), "{shell}: {line:?} gives no {word}: {given:?}");
        }
        for word in unwanted {
            assert!(!words.contains(word), "{shell}: {line:?} gives {word}: {given:?}");
        }
    }
}

#[test]
fn bash_completion_offers_expected_words() {
    check("bash", |line, file| {
        let script = r#"source "$1"; IFS=' ' read -ra COMP_WORDS <<<"$0"; [[ $0 != *' ' ]] || COMP_WORDS+=("")
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); "_${COMP_WORDS[0]//-/_}"; printf '%s\n' "${COMPREPLY[@]}""#;
        shell("bash", script, &[line, &file.display().to_string()])
    });
}

#[test]
fn fish_completion_offers_expected_words() {
    check("fish", |line, file| {
        shell(
            "fish",
            "source $argv[2]; complete -C $argv[1] | string split -f1 \\t",
            &[line, &file.display().to_string()],
        )
    });
}

/// Types a line into an interactive zsh on its own terminal, and lists the completions.
const ZSH: &str = r#"
    zmodload zsh/zpty
    zpty -b z zsh -f -i
    zpty -w z "PROMPT=; fpath=($2 \$fpath); autoload -U compinit; compinit -u -D; COLUMNS=500; told() { print -n TO''LD }
        zle -N told; bindkey '^T' list-choices '^Y' told; print rea''dy"
    until zpty -r z line && [[ $line == *ready* ]]; do :; done
    zpty -w -n z "$1"$'\x14\x19'
    zpty -r z line '*TOLD*'
    print -r -- $line
    zpty -d z
"#;

#[test]
fn zsh_completion_offers_expected_words() {
    check("zsh", |line, file| {
        let dir = file.parent().unwrap().display().to_string();
        let printed = shell("zsh", ZSH, &["zsh", line, &dir]);
        // Removes escape sequences that move the cursor, such as `ESC [ 7 C`.
        let after = |part: &str| part.find(char::is_alphabetic).map(|at| part[at + 1..].to_owned());
        let mut parts = printed.split('\x1b');
        let words: Vec<String> =
            parts.next().map(str::to_owned).into_iter().chain(parts.filter_map(after)).collect();
        words.join(" ")
    });
}
