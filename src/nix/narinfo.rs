//! Narinfos: the metadata that a binary cache serves for a store path, one `Key: value` per line.
//! The Nix manual does not describe the format; this is what Nix reads and writes.
//!
//! The parser is strict. Nix 2.8 and 2.26 fail the whole build over one narinfo that they cannot
//! read, so the parser refuses everything that any supported version of Nix cannot read.

use super::{Malformed, NarHash, PathInfo, Signature, StoreDir, StorePath};
use std::fmt;

const WHAT: &str = "narinfo";

/// A store path's metadata and the location of its NAR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NarInfo {
    /// The metadata that is the same in every cache.
    pub info: PathInfo,
    /// URL of the NAR: relative to the root of the cache, or absolute. Visible ASCII without
    /// spaces.
    pub url: String,
    /// Compression of the NAR at `url`: `none`, `xz`, `zstd`…
    pub compression: String,
}

impl NarInfo {
    /// The most bytes in a narinfo: room for 15,000 references. [`NarInfo::parse`] refuses larger
    /// ones. Package collections have some thousand references (texlive-full 3,700), other paths
    /// below a hundred.
    pub const MAX_LEN: usize = 1024 * 1024;

    /// The most bytes in a NAR: 16 TiB, the largest file on ext4. [`NarInfo::parse`] refuses larger
    /// ones. Sums of sizes stay far below the overflow of `u64`.
    pub const MAX_NAR_SIZE: u64 = 1 << 44;

    /// Parses a narinfo of a path in `store_dir`.
    ///
    /// Unknown fields are ignored. A signature that cannot be parsed is dropped, as another one may
    /// be valid: Nix 2.8 refuses the whole path over a malformed signature by a key that it knows,
    /// Nix 2.36 over any. A deriver that is no store path is dropped too: no signature covers it.
    /// The content address is not parsed; see
    /// [`is_content_addressed`](super::is_content_addressed).
    ///
    /// # Errors
    /// Not UTF-8, a line that is not `Key: value` and LF, a repeated field, a malformed value, or
    /// no `StorePath`, `URL`, `NarHash` or `NarSize`. [`Malformed::is_unsupported`] is set for a
    /// narinfo over [`MAX_LEN`](Self::MAX_LEN), and for names, hashes and sizes that some version
    /// of Nix may write but not every one reads.
    pub fn parse(bytes: &[u8], store_dir: &StoreDir) -> Result<Self, Malformed> {
        if bytes.len() > Self::MAX_LEN {
            return Err(Malformed::unsupported(WHAT, "larger than 1 MiB"));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| Malformed::new(WHAT, "not UTF-8"))?;
        if text.contains('\r') {
            return Err(Malformed::new(WHAT, "has a carriage return"));
        }
        let (mut path, mut url, mut compression, mut nar_hash, mut nar_size) =
            (None, None, None, None, None);
        let (mut references, mut deriver, mut ca) = (None, None, None);
        let mut signatures = Vec::new();
        for line in text.split_inclusive('\n') {
            let line =
                line.strip_suffix('\n').ok_or(Malformed::new(WHAT, "last line has no end"))?;
            let (key, value) =
                line.split_once(": ").ok_or(Malformed::new(WHAT, "a line is not Key: value"))?;
            match key {
                "StorePath" => once(&mut path, store_dir.parse_path(value)?)?,
                "URL" => once(&mut url, word(value)?)?,
                "Compression" => once(&mut compression, value)?,
                "NarHash" => once(&mut nar_hash, NarHash::parse(value)?)?,
                "NarSize" => once(&mut nar_size, size(value)?)?,
                "References" => once(&mut references, paths(value)?)?,
                "Deriver" => once(&mut deriver, StorePath::parse(value).ok())?,
                "Sig" => signatures.extend(Signature::parse(value)),
                "CA" if value.is_empty() => once(&mut ca, None)?,
                "CA" => once(&mut ca, Some(word(value)?.to_owned()))?,
                _ => {}
            }
        }
        // Caches older than the field used bzip2 only, and Nix reads a missing field as bzip2.
        let compression = compression.filter(|name| !name.is_empty()).unwrap_or("bzip2");
        Ok(NarInfo {
            info: PathInfo {
                path: path.ok_or(Malformed::new(WHAT, "no StorePath"))?,
                nar_hash: nar_hash.ok_or(Malformed::new(WHAT, "no NarHash"))?,
                nar_size: nar_size.ok_or(Malformed::new(WHAT, "no NarSize"))?,
                references: references.unwrap_or_default(),
                deriver: deriver.flatten(),
                signatures,
                ca: ca.flatten(),
            },
            url: url.ok_or(Malformed::new(WHAT, "no URL"))?.to_owned(),
            compression: word(compression)?.to_owned(),
        })
    }

    /// Returns the narinfo as [`write()`] writes it, without an additional signature.
    pub fn print(&self, store_dir: &StoreDir) -> String {
        let mut out = String::new();
        let _ = write(
            &mut out,
            &self.info,
            &[&self.url],
            &self.compression,
            None,
            self.info.ca.as_deref(),
            store_dir,
        );
        out
    }
}

/// Writes the narinfo of a path as Nix does, without the `FileHash` and `FileSize` of a compressed
/// file. The parts of `url` are concatenated. `signature` is added if the path does not have it.
/// `References` is written even if empty, with the space after its colon, as Nix skips two bytes
/// there unconditionally.
///
/// # Errors
/// The errors of `out`.
pub fn write(
    out: &mut impl fmt::Write,
    info: &PathInfo,
    url: &[&str],
    compression: &str,
    signature: Option<&Signature>,
    ca: Option<&str>,
    store_dir: &StoreDir,
) -> fmt::Result {
    // No format strings: they would take most of the time.
    let mut line = |key: &str, parts: &[&str]| {
        out.write_str(key)?;
        parts.iter().try_for_each(|part| out.write_str(part))?;
        out.write_char('\n')
    };
    line("StorePath: ", &[store_dir.as_str(), "/", info.path.base_name()])?;
    line("URL: ", url)?;
    line("Compression: ", &[compression])?;
    line("NarHash: sha256:", &[&info.nar_hash.to_nix32()])?;
    line("NarSize: ", &[&info.nar_size.to_string()])?;
    out.write_str("References: ")?;
    for (at, reference) in info.references.iter().enumerate() {
        if at > 0 {
            out.write_char(' ')?;
        }
        out.write_str(reference.base_name())?;
    }
    out.write_char('\n')?;
    if let Some(deriver) = &info.deriver {
        ["Deriver: ", deriver.base_name(), "\n"].iter().try_for_each(|part| out.write_str(part))?;
    }
    let added = signature.filter(|signature| !info.signatures.contains(signature));
    let mut text = String::new();
    for signature in info.signatures.iter().chain(added) {
        text.clear();
        signature.append_to(&mut text);
        ["Sig: ", &text, "\n"].iter().try_for_each(|part| out.write_str(part))?;
    }
    match ca {
        Some(ca) => ["CA: ", ca, "\n"].iter().try_for_each(|part| out.write_str(part)),
        None => Ok(()),
    }
}

fn once<T>(field: &mut Option<T>, value: T) -> Result<(), Malformed> {
    match field.replace(value) {
        None => Ok(()),
        Some(_) => Err(Malformed::new(WHAT, "a field is repeated")),
    }
}

fn word(value: &str) -> Result<&str, Malformed> {
    if value.is_empty() || !value.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Malformed::new(
            WHAT,
            "URL, Compression or CA is empty or has a space, control or non-ASCII character",
        ));
    }
    Ok(value)
}

fn size(value: &str) -> Result<u64, Malformed> {
    // `u64::from_str` alone would accept a plus sign.
    let size =
        if value.bytes().all(|b| b.is_ascii_digit()) { value.parse::<u64>().ok() } else { None };
    match size {
        Some(size @ 1..=NarInfo::MAX_NAR_SIZE) => Ok(size),
        // Some caches write 0 if their database does not record the size.
        Some(_) => Err(Malformed::unsupported(WHAT, "NarSize is 0 or over 16 TiB")),
        None => Err(Malformed::new(WHAT, "NarSize is no number of bytes")),
    }
}

fn paths(value: &str) -> Result<Vec<StorePath>, Malformed> {
    let mut paths = value
        .split(' ')
        .filter(|word| !word.is_empty())
        .map(StorePath::parse)
        .collect::<Result<Vec<_>, _>>()?;
    paths.sort_unstable();
    paths.dedup();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::golden;

    const GOOD: &str = "\
StorePath: /nix/store/vx8ssdprqbd8zwyipycgh6jp25k69rx6-selfish-1.0
URL: nar/x.nar
Compression: none
NarHash: sha256:0qrk4rqb49jlkvr35h6y6hqib0068b3r4g3s4rhr7dfl8fmj8fr3
NarSize: 760
References: vx8ssdprqbd8zwyipycgh6jp25k69rx6-selfish-1.0 z4asv3j07d89ywjf8fxkn7sg6mf5s9q5-dep
";

    fn parse(text: &str) -> Result<NarInfo, Malformed> {
        NarInfo::parse(text.as_bytes(), &golden::store_dir())
    }

    #[test]
    fn narinfo_of_nix_round_trips() {
        let texts = golden::narinfo_texts();
        assert_eq!(texts.len(), 20);
        for text in texts {
            let kept: String =
                text.split_inclusive('\n').filter(|line| !line.starts_with("File")).collect();
            assert_eq!(parse(&text).unwrap().print(&golden::store_dir()), kept);
        }
    }

    #[test]
    fn optional_or_unknown_field_is_tolerated() {
        let good = parse(GOOD).unwrap();
        assert_eq!(
            (good.url.as_str(), good.compression.as_str(), good.info.nar_size),
            ("nar/x.nar", "none", 760)
        );
        assert_eq!(parse(&GOOD.replace("Compression: none\n", "")).unwrap().compression, "bzip2");
        assert_eq!(
            parse(&GOOD.replace("Compression: none", "Compression: ")).unwrap().compression,
            "bzip2"
        );
        let with = |line: &str| parse(&format!("{GOOD}{line}\n"));
        assert_eq!(with("X-Peer: a: b"), Ok(good.clone()));
        assert_eq!(with("Deriver: unknown-deriver"), Ok(good.clone()));
        assert_eq!(with("CA: "), Ok(good.clone()));
        assert_eq!(with("Sig: no signature"), Ok(good.clone()));
        assert_eq!(with("Sig: k:AAAA"), Ok(good.clone()));
        assert_eq!(with("Deriver: "), Ok(good.clone()));
        assert_eq!(with("Deriver: /nix/store/x.drv"), Ok(good.clone()));
        for ca in ["fixed:r:sha256:0", "fixed:r:blake3:0", "x"] {
            assert_eq!(with(&format!("CA: {ca}")).unwrap().info.ca.as_deref(), Some(ca));
        }
        let sig =
            golden::narinfo("vx8ssdprqbd8zwyipycgh6jp25k69rx6").info.signatures[0].to_string();
        assert_eq!(
            with(&format!("Sig: bad\nSig: {sig}\nSig: {sig}")).unwrap().info.signatures.len(),
            2
        );
        let references = GOOD.lines().last().unwrap();
        for none in ["References: \n", ""] {
            assert!(
                parse(&GOOD.replace(&format!("{references}\n"), none))
                    .unwrap()
                    .info
                    .references
                    .is_empty()
            );
        }
        let unsorted = "References:  z4asv3j07d89ywjf8fxkn7sg6mf5s9q5-dep vx8ssdprqbd8zwyipycgh6jp25k69rx6-selfish-1.0 \
                        z4asv3j07d89ywjf8fxkn7sg6mf5s9q5-dep";
        assert_eq!(parse(&GOOD.replace(references, unsorted)), Ok(good));
    }

    #[test]
    fn malformed_field_is_refused() {
        for (from, to) in [
            ("StorePath: /nix/store/", "StorePath: /gnu/store/"),
            ("StorePath: /nix/store/", "StorePath: "),
            ("selfish-1.0\nURL", "selfish/1.0\nURL"),
            ("URL: nar/x.nar", "URL: "),
            ("URL: nar/x.nar", "URL: nar/x y.nar"),
            ("URL: nar/x.nar", "URL: nar/\u{1}.nar"),
            ("URL: nar/x.nar", "URL: nar/é.nar"),
            ("Compression: none", "Compression: no ne"),
            ("sha256:0", "sha256:"),
            ("sha256:0", "sha1:0"),
            ("NarSize: 760", "NarSize: 0"),
            ("NarSize: 760", "NarSize: +760"),
            ("NarSize: 760", "NarSize: -760"),
            ("NarSize: 760", "NarSize: 7 60"),
            ("NarSize: 760", "NarSize: "),
            ("NarSize: 760", "NarSize: 17592186044417"),
            ("NarSize: 760", "NarSize: 99999999999999999999"),
            ("References: v", "References: /nix/store/v"),
            ("References: ", "References:"),
            ("References: ", "References "),
            ("\n", "\r\n"),
            ("NarSize: 760\n", "NarSize: 760\n\n"),
            ("-dep\n", "-dep"),
        ] {
            assert!(GOOD.contains(from));
            assert!(parse(&GOOD.replacen(from, to, 1)).is_err(), "{from} -> {to}");
        }
        for line in GOOD.lines() {
            assert!(parse(&format!("{GOOD}{line}\n")).is_err(), "repeated {line}");
            let optional = line.starts_with("Compression") || line.starts_with("References");
            assert_eq!(
                parse(&GOOD.replace(&format!("{line}\n"), "")).is_ok(),
                optional,
                "without {line}"
            );
        }
        for line in ["Deriver: x\nDeriver: x", "CA: x y", "CA: é", "CA: \nCA: ", "X: \r"] {
            assert!(parse(&format!("{GOOD}{line}\n")).is_err(), "{line}");
        }
        assert!(
            NarInfo::parse(&[GOOD.as_bytes(), b"X: \xff\n"].concat(), &golden::store_dir())
                .is_err()
        );
        let filled = |len: usize| format!("{GOOD}X: {}\n", "x".repeat(len - GOOD.len() - 4));
        assert!(parse(&filled(NarInfo::MAX_LEN)).is_ok());
        assert!(parse(&filled(NarInfo::MAX_LEN + 1)).is_err());
    }

    #[test]
    fn damaged_narinfo_is_refused_or_round_trips() {
        let dir = golden::store_dir();
        // One with a deriver and signatures, one with a content address, one with bzip2.
        let texts = golden::narinfo_texts();
        let chosen = texts
            .iter()
            .filter(|t| t.contains("Deriver") || t.contains("i4wljjza") || t.contains("bzip2"));
        for text in chosen {
            for end in 0..text.len() {
                assert!(parse(&text[..end]).is_err() || text[..end].ends_with('\n'));
                for byte in
                    [0, b'\n', b'\r', b' ', b':', b'0', b'z', b'/', 0xff, text.as_bytes()[end] ^ 1]
                {
                    let mut changed = text.clone().into_bytes();
                    changed[end] = byte;
                    if let Ok(narinfo) = NarInfo::parse(&changed, &dir) {
                        assert_eq!(parse(&narinfo.print(&dir)), Ok(narinfo));
                    }
                }
            }
        }
    }
}
