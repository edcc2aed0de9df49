//! Makes the NAR listing of a store path from its files.

use super::{
    NarError,
    nar::OpenedFile,
    walk::{Walk, WalkStep},
};
use crate::nix::{listing, nar};

/// The largest listing that is made, in bytes (some 150,000 files); a larger one is an error.
const MAX_LISTING: usize = 16 << 20;

/// Returns the listing of the tree that `walk` visits. Fails if the tree's NAR does not have
/// exactly `nar_size` bytes.
pub(super) fn listing(mut walk: Walk, nar_size: u64) -> Result<Vec<u8>, NarError> {
    let mut out = Vec::new();
    let mut position = nar::MAGIC.len() as u64;
    let mut first = true;
    listing::open(&mut out);
    while let Some(step) = walk.advance()? {
        if step != WalkStep::Leave && !walk.at_root() {
            let name = walk.name().to_bytes();
            listing::entry(&mut out, first, name);
            position += nar::entry_open_len(name.len() as u64);
        }
        match step {
            WalkStep::Enter => {
                listing::directory_open(&mut out);
                position += nar::DIRECTORY_OPEN.len() as u64;
            }
            WalkStep::Leave => {
                listing::directory_close(&mut out);
                position += nar::CLOSE.len() as u64;
            }
            WalkStep::Symlink => {
                let target = walk.target()?;
                listing::symlink(&mut out, target.to_bytes());
                position += nar::symlink_len(target.count_bytes() as u64);
            }
            WalkStep::Regular => {
                let file = OpenedFile::find(&walk, false)?;
                if file.size > nar_size {
                    return Err(walk.changed("larger than what was registered"));
                }
                let contents = position + nar::regular_open_len(file.executable);
                listing::regular(&mut out, file.size, file.executable, contents);
                position += nar::regular_len(file.executable, file.size);
            }
        }
        if step != WalkStep::Enter && !walk.at_root() {
            position += nar::CLOSE.len() as u64;
        }
        first = step == WalkStep::Enter;
        if out.len() > MAX_LISTING {
            return Err(NarError::Unsupported {
                path: walk.path(),
                why: "listing larger than 16 MiB",
            });
        }
        if position > nar_size {
            return Err(walk.changed("larger than what was registered"));
        }
    }
    listing::close(&mut out);
    if position != nar_size {
        return Err(walk.changed("smaller than what was registered"));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Fixture, odd_tree};

    #[test]
    fn listing_offsets_point_at_file_contents() {
        let fixture = Fixture::new();
        let (info, nar) = fixture.add(odd_tree);
        let json: serde_json::Value =
            serde_json::from_slice(&fixture.open().listing(&info).unwrap()).unwrap();
        let root = &json["root"]["entries"];
        let run = &root["b"]["entries"]["c"]["entries"]["run"];
        assert_eq!(run["executable"], true);
        for (file, text) in [
            (run, "#!/bin/sh"),
            (&root["ä b\n"], "text"),
            (&root["a-b"], "xxxxxxx"),
            (&root["a"], ""),
        ] {
            let at = file["narOffset"].as_u64().unwrap() as usize;
            assert_eq!(file["size"], text.len());
            assert_eq!(&nar[at - 8..at], (text.len() as u64).to_le_bytes());
            assert!(nar[at..].starts_with(text.as_bytes()));
        }
        assert_eq!(root["b"]["entries"]["link"]["target"], "../../nowhere");
        assert_eq!(root["empty"]["entries"].as_object().unwrap().len(), 0);
    }
}
