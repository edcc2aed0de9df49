//! The metadata of a valid store path.

use super::{NarHash, Signature, StoreDir, StorePath};

/// The metadata of a valid path that both Nix's database and a narinfo hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfo {
    /// The path itself.
    pub path: StorePath,
    /// SHA-256 of its NAR.
    pub nar_hash: NarHash,
    /// Size of its NAR in bytes.
    pub nar_size: u64,
    /// The store paths that it refers to, possibly including itself; sorted, without duplicates.
    pub references: Vec<StorePath>,
    /// The derivation that built it, if known.
    pub deriver: Option<StorePath>,
    /// The stored signatures, in the stored order.
    pub signatures: Vec<Signature>,
    /// The content address (`fixed:r:sha256:…`, `text:sha256:…`) of a content-addressed path.
    pub ca: Option<String>,
}

impl PathInfo {
    /// Returns the text that Nix signs: `1;<path>;sha256:<Nix32>;<NAR size>;<references,
    /// comma-separated>`, with absolute paths (Nix manual, "Signatures"). [`PathInfo::references`]
    /// must be sorted.
    pub fn fingerprint(&self, store_dir: &StoreDir) -> String {
        debug_assert!(self.references.is_sorted());
        let mut text =
            format!("1;{};{};{};", store_dir.join(&self.path), self.nar_hash, self.nar_size);
        for (i, reference) in self.references.iter().enumerate() {
            if i > 0 {
                text.push(',');
            }
            text.push_str(store_dir.as_str());
            text.push('/');
            text.push_str(reference.base_name());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use crate::nix::golden;

    // The tests in `signature` compare signatures of Nix, which proves the whole format.
    #[test]
    fn fingerprint_contains_every_field_in_order() {
        let selfish = golden::narinfo("vx8ssdprqbd8zwyipycgh6jp25k69rx6");
        assert_eq!(
            selfish.info.fingerprint(&golden::store_dir()),
            "1;/nix/store/vx8ssdprqbd8zwyipycgh6jp25k69rx6-selfish-1.0;\
             sha256:0qrk4rqb49jlkvr35h6y6hqib0068b3r4g3s4rhr7dfl8fmj8fr3;760;\
             /nix/store/3dkysgwd1333b6gba2zrwpvvrppjpbyd-1r8s2k4wzhdr1gx2j60wdz02k69jkx15-plain,\
             /nix/store/vx8ssdprqbd8zwyipycgh6jp25k69rx6-selfish-1.0,\
             /nix/store/z4asv3j07d89ywjf8fxkn7sg6mf5s9q5-dep"
        );
    }
}
