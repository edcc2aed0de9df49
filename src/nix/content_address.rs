//! Content addresses: the name of a content-addressed path follows from its contents, so the path
//! needs no signature (Nix manual, "Content-addressing store objects" and "Store path
//! specification").

use super::{HashPart, Malformed, PathInfo, StoreDir, StorePath, nix32};
use data_encoding::HEXLOWER;
use ring::digest::{SHA256, digest};

/// A content address as Nix's database and narinfos write it: `text:sha256:<Nix32>` or
/// `fixed:[r:|git:]<algorithm>:<Nix32>`.
#[derive(Debug)]
pub(super) struct ContentAddress<'a> {
    method: ContentMethod,
    algorithm: &'a str,
    digest: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ContentMethod {
    Text,
    Flat,
    Recursive,
    /// The hash of a Git tree. Nix 2.22 and later read it if `git-hashing` is enabled.
    Git,
}

impl ContentMethod {
    /// Returns the text between `fixed:` and the algorithm.
    fn prefix(self) -> &'static str {
        match self {
            ContentMethod::Text | ContentMethod::Flat => "",
            ContentMethod::Recursive => "r:",
            ContentMethod::Git => "git:",
        }
    }
}

impl<'a> ContentAddress<'a> {
    pub(super) fn parse(text: &'a str) -> Result<Self, Malformed> {
        const WHAT: &str = "content address";
        let (method, rest) = if let Some(rest) = text.strip_prefix("text:") {
            (ContentMethod::Text, rest)
        } else if let Some(rest) = text.strip_prefix("fixed:r:") {
            (ContentMethod::Recursive, rest)
        } else if let Some(rest) = text.strip_prefix("fixed:git:") {
            (ContentMethod::Git, rest)
        } else if let Some(rest) = text.strip_prefix("fixed:") {
            (ContentMethod::Flat, rest)
        } else {
            return Err(Malformed::new(WHAT, "neither text: nor fixed:"));
        };
        let (algorithm, digits) = rest.split_once(':').ok_or(Malformed::new(WHAT, "no hash"))?;
        let len = match algorithm {
            "sha256" => 32,
            "blake3" | "sha512" | "sha1" | "md5" if method == ContentMethod::Text => {
                return Err(Malformed::new(WHAT, "text: goes with sha256 alone"));
            }
            "blake3" => 32,
            "sha512" => 64,
            "sha1" => 20,
            "md5" => 16,
            _ => return Err(Malformed::new(WHAT, "unknown hash algorithm")),
        };
        let digest = nix32::decode(digits.as_bytes())?;
        if digest.len() != len {
            return Err(Malformed::new(WHAT, "hash of another length than its algorithm's"));
        }
        Ok(ContentAddress { method, algorithm, digest })
    }

    /// Computes the hash part of the path that has the name of `path`, this content and these
    /// references. `None` if the method does not permit references.
    fn hash_part(
        &self,
        path: &StorePath,
        references: &[StorePath],
        store_dir: &StoreDir,
    ) -> Option<HashPart> {
        let (kind, inner) = match (self.method, self.algorithm) {
            (ContentMethod::Text, _) => (
                with_references("text", references.iter(), store_dir),
                HEXLOWER.encode(&self.digest),
            ),
            (ContentMethod::Recursive, "sha256") => {
                // The path's own hash part is not known yet; Nix writes `:self` for it.
                let mut kind =
                    with_references("source", references.iter().filter(|r| *r != path), store_dir);
                if references.contains(path) {
                    kind.push_str(":self");
                }
                (kind, HEXLOWER.encode(&self.digest))
            }
            // The `fixed:out` form has no field for references.
            (_, _) if !references.is_empty() => return None,
            (method, algorithm) => {
                let prefix = method.prefix();
                let inner =
                    format!("fixed:out:{prefix}{algorithm}:{}:", HEXLOWER.encode(&self.digest));
                (
                    "output:out".to_owned(),
                    HEXLOWER.encode(digest(&SHA256, inner.as_bytes()).as_ref()),
                )
            }
        };
        let outer = format!("{kind}:sha256:{inner}:{}:{}", store_dir.as_str(), path.name());
        // Nix XORs the 32 bytes of the digest into 20, which 32 Nix32 digits encode.
        let mut folded = [0; 20];
        for (i, byte) in digest(&SHA256, outer.as_bytes()).as_ref().iter().enumerate() {
            folded[i % 20] ^= byte;
        }
        HashPart::parse(nix32::encode(&folded).as_bytes()).ok()
    }
}

fn with_references<'a>(
    kind: &str,
    references: impl Iterator<Item = &'a StorePath>,
    store_dir: &StoreDir,
) -> String {
    let mut text = kind.to_owned();
    for reference in references {
        text.push(':');
        text.push_str(&store_dir.join(reference));
    }
    text
}

/// Returns whether the hash part of `info.path` follows from its `ca`, name and references. Nix
/// accepts such a path without a signature. The NAR itself is not checked; Nix hashes it on
/// arrival.
pub fn is_content_addressed(info: &PathInfo, store_dir: &StoreDir) -> bool {
    let Some(Ok(ca)) = info.ca.as_deref().map(ContentAddress::parse) else {
        return false;
    };
    ca.hash_part(&info.path, &info.references, store_dir) == Some(info.path.hash_part())
}

/// Returns whether every supported version of Nix can read this content address. Nix 2.8 and 2.26
/// fail the whole build over one that they cannot read, even if another substituter has the path.
pub fn is_known_to_every_nix(ca: &str) -> bool {
    ContentAddress::parse(ca)
        .is_ok_and(|ca| ca.method != ContentMethod::Git && ca.algorithm != "blake3")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::golden;

    #[test]
    fn content_addressed_paths_of_nix_are_recognized() {
        let dir = golden::store_dir();
        let mut forms = std::collections::BTreeSet::new();
        for narinfo in golden::narinfos() {
            let info = narinfo.info;
            assert_eq!(is_content_addressed(&info, &dir), info.ca.is_some(), "{info:?}");
            if let Some(ca) = &info.ca {
                forms.insert((ca[..ca.rfind(':').unwrap()].to_owned(), info.references.len()));
            }
        }
        let forms: Vec<_> =
            forms.iter().map(|(form, references)| (form.as_str(), *references)).collect();
        assert_eq!(
            forms,
            [
                ("fixed:md5", 0),
                ("fixed:r:md5", 0),
                ("fixed:r:sha1", 0),
                ("fixed:r:sha256", 0),
                ("fixed:r:sha256", 3), // one of the three is the path itself
                ("fixed:r:sha512", 0),
                ("fixed:sha1", 0),
                ("fixed:sha256", 0),
                ("fixed:sha512", 0),
                ("text:sha256", 0),
                ("text:sha256", 2),
            ]
        );
    }

    #[test]
    fn changed_field_is_not_content_addressed() {
        let dir = golden::store_dir();
        let other = golden::narinfo("z4asv3j07d89ywjf8fxkn7sg6mf5s9q5").info.path;
        for narinfo in golden::narinfos().into_iter().filter(|n| n.info.ca.is_some()) {
            let good = narinfo.info;
            let ca = good.ca.clone().unwrap();
            let wrong_hash = if ca.ends_with('0') {
                ca.replace('0', "1")
            } else {
                format!("{}0", &ca[..ca.len() - 1])
            };
            let renamed = StorePath::parse(&format!("{}x", good.path.base_name())).unwrap();
            for bad in [
                PathInfo { ca: None, ..good.clone() },
                PathInfo { ca: Some(wrong_hash), ..good.clone() },
                PathInfo {
                    ca: Some(ca.replace("fixed:r:", "fixed:").replace("text:", "fixed:")),
                    ..good.clone()
                },
                PathInfo { ca: Some(ca.replace("fixed:", "fixed:r:")), ..good.clone() },
                PathInfo { path: renamed, ..good.clone() },
                PathInfo { references: vec![other.clone()], ..good.clone() },
            ] {
                assert!(bad == good || !is_content_addressed(&bad, &dir), "{bad:?}");
            }
            assert!(!is_content_addressed(&good, &StoreDir::parse("/gnu/store").unwrap()));
        }
    }

    #[test]
    fn malformed_content_address_is_refused() {
        let zeros = |n| "0".repeat(n);
        for (form, digits) in
            [("text:sha256", 52), ("fixed:sha1", 32), ("fixed:r:md5", 26), ("fixed:sha512", 103)]
        {
            assert!(ContentAddress::parse(&format!("{form}:{}", zeros(digits))).is_ok(), "{form}");
            for wrong in (0..=110).filter(|n| *n != digits) {
                assert!(
                    ContentAddress::parse(&format!("{form}:{}", zeros(wrong))).is_err(),
                    "{form} {wrong}"
                );
            }
        }
        for (form, digits) in
            [("fixed:git:sha1", 32), ("fixed:git:sha256", 52), ("fixed:r:blake3", 52)]
        {
            let ca = format!("{form}:{}", zeros(digits));
            assert!(ContentAddress::parse(&ca).is_ok() && !is_known_to_every_nix(&ca), "{ca}");
        }
        assert!(is_known_to_every_nix(&format!("fixed:r:sha1:{}", zeros(32))));
        assert!(!is_known_to_every_nix(&format!("fixed:r:sha3:{}", zeros(32))));
        for form in
            ["", "text", "fixed", "text:sha1", "text:blake3", "text:r:sha256", "fixed:sha3", "é"]
        {
            assert!(ContentAddress::parse(&format!("{form}:{}", zeros(32))).is_err(), "{form}");
            assert!(ContentAddress::parse(&format!("{form}:{}", zeros(52))).is_err(), "{form}");
            assert!(ContentAddress::parse(form).is_err(), "{form}");
        }
    }
}
