//! Journals that are longer than a pack.

use std::collections::BTreeMap;

use super::*;
use crate::catalog::digest::Digest;
use crate::history::pack::PACK_BYTES_MAX;
use crate::progress::Progress;
use crate::store::{self, OpenOptions};

/// Of a file of some hundred gigabytes.
const PARTS: usize = 2_000_000;

/// Parts that no compression makes smaller.
fn parts() -> Parts {
    let digest = |n: u64| blake3::hash(&n.to_le_bytes()).as_bytes()[..size_of::<Digest>()].to_vec();
    (0..PARTS as u64).map(|n| (digest(n).try_into().ok(), 64 << 10)).collect()
}

/// The parts of a recipe, out of the journals of all packs.
fn noted(packer: &Packer<'_>, recipe: ContentId) -> Vec<(u64, Parts)> {
    let mut pieces = BTreeMap::new();
    for pack in packer.catalog.packs().expect("a look") {
        assert!(pack.bytes < PACK_BYTES_MAX, "{pack:?}");
        let bytes = packer.history.packs.bytes(packer.replicas, pack.id).expect("it is there");
        for record in scan(&bytes).expect("a good pack").records {
            if let Record::Recipe { id, first, parts } = record
                && id == recipe
            {
                pieces.insert(first, parts);
            }
        }
    }
    pieces.into_iter().collect()
}

#[test]
fn a_recipe_longer_than_a_pack_is_noted_in_several_and_stays_when_they_are_copied() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
    let paths: Vec<_> = dirs.iter().map(|dir| dir.path().canonicalize().expect("it is")).collect();
    let recover =
        |replicas: &ReplicaSet, catalog: &Catalog, from| History::recover(replicas, catalog, from);
    let options = OpenOptions { init: true, ..OpenOptions::default() };
    let store = store::open(&paths, &options, &recover, &Progress::silent());
    let store = store.expect("a store");
    let history = History::open(&store.replicas, store.uuid).expect("its history");
    let mut packer = Packer::new(&history, &store.replicas, &store.catalog, &|_| Ok(()));
    let recipe = store.catalog.next_content();
    let parts = parts();
    let mut chunks = Vec::new();
    // Ever so many chunks come with so many parts.
    for (index, some) in parts.chunks(PARTS / 8).enumerate() {
        let bytes = vec![index as u8; 5000];
        let (id, _) = packer.chunk(&bytes).expect("room");
        chunks.push((id, 5000));
        let mut cut = Cut { noted: (index * some.len()) as u64, ..Cut::default() };
        cut.parts = some.to_vec();
        packer.note_recipe(recipe, &mut cut);
    }
    let used = Change::Pack(PackChange::RecipeAdd { id: recipe, chunks });
    packer.record(vec![vec![used]]).expect("room");
    let all = |packer: &Packer<'_>| {
        let pieces = noted(packer, recipe).into_iter();
        pieces.fold(Parts::new(), |mut all, (first, more)| {
            assert_eq!(first, all.len() as u64);
            all.extend(more);
            all
        })
    };
    assert!(store.catalog.packs().expect("a look").len() > 1);
    assert!(all(&packer) == parts);
    // Their chunks are next to nothing, and what they are copied into is as long.
    let packs = store.catalog.packs().expect("a look");
    packer.copy_out(packs, u64::MAX).expect("room");
    assert!(all(&packer) == parts);
}
