//! Comparison of two directory trees, in the properties that a NAR stores.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Panics at the first difference in type, names, executable bit, link target or content.
pub fn assert_same(expected: &Path, found: &Path) {
    let meta = |path: &Path| {
        fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let (left, right) = (meta(expected), meta(found));
    let at = found.display();
    assert_eq!(left.file_type(), right.file_type(), "{at}: kind");
    if left.is_symlink() {
        assert_eq!(
            fs::read_link(expected).expect("a link"),
            fs::read_link(found).expect("a link"),
            "{at}: target"
        );
    } else if left.is_dir() {
        let names = |path: &Path| {
            let mut names: Vec<_> = fs::read_dir(path)
                .expect("a directory")
                .map(|entry| entry.expect("an entry").file_name())
                .collect();
            names.sort_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
            names
        };
        let children = names(expected);
        assert_eq!(children, names(found), "{at}: names");
        for name in children {
            assert_same(&expected.join(&name), &found.join(&name));
        }
    } else {
        let executable = |meta: &fs::Metadata| meta.permissions().mode() & 0o100 != 0;
        assert_eq!(executable(&left), executable(&right), "{at}: executable");
        assert_eq!(left.len(), right.len(), "{at}: size");
        let same = fs::read(expected).expect("a file") == fs::read(found).expect("a file");
        assert!(same, "{at}: content");
    }
}
