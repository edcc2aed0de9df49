//! Hand-written NARs, also malformed ones.

/// A string in a NAR: length, bytes, zero padding to a multiple of eight.
pub fn string(bytes: &[u8]) -> Vec<u8> {
    let mut out = (bytes.len() as u64).to_le_bytes().to_vec();
    out.extend(bytes);
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

fn strings(parts: &[&str]) -> Vec<u8> {
    parts.iter().flat_map(|part| string(part.as_bytes())).collect()
}

/// A regular file.
pub fn file(content: &[u8]) -> Vec<u8> {
    [strings(&["(", "type", "regular", "contents"]), string(content), string(b")")].concat()
}

/// A symlink.
pub fn link(target: &[u8]) -> Vec<u8> {
    [strings(&["(", "type", "symlink", "target"]), string(target), string(b")")].concat()
}

/// A directory, with its entries in the given order.
pub fn directory(entries: &[(&[u8], Vec<u8>)]) -> Vec<u8> {
    let mut out = strings(&["(", "type", "directory"]);
    for (name, node) in entries {
        out.extend(strings(&["entry", "(", "name"]));
        out.extend(string(name));
        out.extend(string(b"node"));
        out.extend(node);
        out.extend(string(b")"));
    }
    out.extend(string(b")"));
    out
}

/// The complete archive of a node.
pub fn archive(node: &[u8]) -> Vec<u8> {
    [&string(b"nix-archive-1")[..], node].concat()
}
