//! Real Nix on one host fetches real paths of every kind from the store of another.

use crate::common::lan::Run;
use crate::common::{Asker, Holder, Lan, PORT, World, daemon, nix};

#[test]
fn closure_signed_by_peer_is_fetched() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let mut key = String::new();
    let holder = Holder::with(&lan, &world, "holder", |host| {
        key = nix::generate_key(host);
        vec!["--private-key".into(), "/etc/peerix.sec".into()]
    });
    let asker = Asker::with(&lan, "", &[&key]);
    asker.meet(&[&holder]);
    let closure = asker.fetch_and_check(&world, world.path("closure300"));
    assert_eq!(closure.len(), 300);
    nix::assert_nothing_but(&asker.host, &closure);
    let signatures =
        asker.host.cmd("nix").args(["path-info", "--sigs", world.path("closure300")]).okay();
    assert!(signatures.contains("holder-1:"), "{signatures}");

    // A client that trusts only another key takes nothing.
    let stranger = Asker::with(&lan, "", &[&world.cache_key]);
    let output = nix::realise(&stranger.host, &[world.path("little")]);
    assert!(!output.status.success(), "a path was taken that no trusted key has signed");
    nix::assert_nothing_but(&stranger.host, &[]);
}

#[test]
fn closure_signed_by_other_cache_is_fetched() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::new(&lan, &world, &[&holder]);
    let closure = asker.fetch_and_check(&world, world.path("closure300"));
    assert_eq!(closure.len(), 300);

    // `nix copy` looks up one path at a time, and begins with HEAD.
    let copier = Asker::new(&lan, &world, &[&holder]);
    let url = format!("http://127.0.0.1:{PORT}");
    let output =
        copier.host.cmd("nix").args(["copy", "--from", &url, world.path("closure300")]).ran();
    nix::assert_quiet(&output);
    assert_eq!(copier.assert_closure_complete(&world, world.path("closure300")).len(), 300);
}

#[test]
fn paths_of_every_kind_are_fetched() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::new(&lan, &world, &[&holder]);
    for name in ["many", "odd", "large", "little"] {
        asker.fetch_and_check(&world, world.path(name));
    }
    asker.fetch_and_check(&world, world.path("big"));
}

#[test]
fn content_addressed_paths_need_no_signature() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::with(&lan, &world, "holder", |_| vec![]);
    let asker = Asker::new(&lan, &world, &[&holder]);
    holder.host.sh("mkdir -p /tmp/tree/sub; echo a > /tmp/tree/a; ln -s a /tmp/tree/sub/link");
    let tree = holder.host.cmd("nix-store").args(["--add", "/tmp/tree"]).okay();
    let flat = holder.host.cmd("nix-store").args(["--add-fixed", "sha256", "/tmp/tree/a"]).okay();
    // A derivation is content-addressed text with references.
    let derivation = holder
        .host
        .cmd("nix-store")
        .args(["--query", "--deriver", world.path("closure300")])
        .okay();
    let paths = [tree.trim(), flat.trim(), derivation.trim()];
    let url = format!("http://127.0.0.1:{PORT}");
    nix::realise_quietly(&asker.host, &paths[..2]);
    nix::assert_quiet(
        &asker.host.cmd("nix").args(["copy", "--derivation", "--from", &url, paths[2]]).ran(),
    );
    nix::assert_whole(&asker.host, &paths, &holder.host.path("/nix/store"));
    // A path is found at once after its registration.
    let mark = daemon::add_unique_path(&holder.host);
    nix::realise_quietly(&asker.host, &[&mark]);
    nix::assert_whole(&asker.host, &[&mark], &holder.host.path("/nix/store"));
}
