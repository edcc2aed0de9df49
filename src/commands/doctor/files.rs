//! Checks the files that the daemon uses: it has to be able to read Nix's database, and other users
//! must not be able to read its secrets.

use crate::commands::report::Findings;
use crate::commands::shell::quote;
use crate::config::Config;
use crate::store::{Store, StoreConfig, StoreError};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Checks that the daemon can open Nix's database, as far as this user can tell. Blocks for at
/// most 10 s on a locked database, 5 s for each of two queries.
pub(super) fn check_database(report: &mut Findings, config: &Config) {
    let (db, uid) = (config.db.display(), rustix::process::getuid());
    match open_store(config) {
        Err(e) => report.fail("database", e.to_string(), store_remedy(&e, &config.db)),
        // Root can read every file, and the daemon may run as another user.
        Ok(_) if uid.is_root() && !is_readable(&config.db) => {
            report.fail(
                "database",
                format!("{db}: only its owner may read it, and peerix may run as another user"),
                permission_remedy(&config.db),
            );
        }
        Ok(_) => report.ok("database", format!("{db} can be read by this user ({})", uid.as_raw())),
    }
}

/// Returns the remedy for a daemon that cannot open Nix's database. Blocks for at most 10 s on a
/// locked database, 5 s for each of two queries.
pub(super) fn database_remedy(config: &Config) -> String {
    match open_store(config) {
        Err(e) => store_remedy(&e, &config.db),
        // This user can open the database, and the daemon's user cannot.
        Ok(_) => permission_remedy(&config.db),
    }
}

fn open_store(config: &Config) -> Result<Store, StoreError> {
    Store::open(StoreConfig {
        store_dir: config.store_dir.clone(),
        db: config.db.clone(),
        root: config.root.clone(),
    })
}

fn store_remedy(e: &StoreError, db: &Path) -> String {
    let file = quote(&db.display().to_string());
    match e {
        StoreError::Unreadable { .. } => permission_remedy(db),
        StoreError::WalUnavailable { .. } => "systemctl enable --now nix-daemon.socket".into(),
        StoreError::Missing { .. } => "install Nix, or name the place by --db FILE".into(),
        // `nix-store --verify` would remove these paths from the database.
        StoreError::NoFiles { .. } => {
            "mount the store, or name the one that the database is of by --root DIR".into()
        }
        StoreError::Busy { .. } => format!("whose lock it is: fuser -v {file}"),
        StoreError::Database { .. } => {
            format!(
                "what is wrong with it: sqlite3 {file} 'pragma integrity_check'\nif it is damaged, put it back from a backup"
            )
        }
        _ => "nix-store --verify".into(),
    }
}

/// Whether every user can read `file`, judged by its mode and the modes of its directories.
fn is_readable(file: &Path) -> bool {
    let may = |path: &Path, bit| {
        fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & bit != 0)
    };
    may(file, 0o004)
        && file.ancestors().skip(1).all(|dir| dir.as_os_str().is_empty() || may(dir, 0o001))
}

/// Returns the command that lets every user read the database.
fn permission_remedy(db: &Path) -> String {
    format!("chmod -R o+rX {}", quote(&db.parent().unwrap_or(db).display().to_string()))
}

/// Checks that other users cannot read the private key and the identity.
pub(super) fn check_secrets(report: &mut Findings, config: &Config) {
    let identity = config.state_dir.as_ref().map(|dir| dir.join("identity"));
    for file in config.private_key.iter().chain(identity.iter()) {
        let name = file.display();
        let word = quote(&name.to_string());
        match fs::metadata(file) {
            // systemd gives a service access to its credentials by group permissions.
            Ok(meta) if meta.permissions().mode() & 0o007 != 0 => {
                let remedy = match file.starts_with("/nix/store") {
                    true => format!(
                        "install -m 600 {word} /etc/nix/peerix.sec, name that file, and make another key"
                    ),
                    false => format!("chmod 600 {word}"),
                };
                report.fail(
                    "secret",
                    format!("{name}: every user of this machine may read it, and sign as it"),
                    remedy,
                );
            }
            Ok(_) => report.ok("secret", format!("{name} cannot be read by others")),
            // The daemon creates a missing identity at its start.
            Err(e)
                if e.kind() == ErrorKind::NotFound && config.private_key.as_ref() != Some(file) => {
            }
            Err(e) => report.note("secret", format!("{name}: cannot be looked at: {e}")),
        }
    }
}
