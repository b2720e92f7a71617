//! Trees that have one of everything, made by a script so that a reader sees what is in them.

use std::path::Path;

use super::{need, shell};

/// Fills `folder` with one of everything a filesystem can hold: hard links, symlinks, holes, odd
/// names and modes, other owners, old and sub-second times, xattrs, ACLs, a FIFO and a device.
#[track_caller]
pub fn rich_tree(folder: &Path) {
    need(&["setfacl", "setfattr"]);
    super::user::ordinary_user();
    std::fs::create_dir_all(folder).expect("a folder can be made");
    shell(
        folder,
        r#"
mkdir -p src/deep/er docs empty "with space"
for i in 1 2 3 4 5 6 7 8 9; do seq $i 400 > "src/file$i.rs"; done
head -c 300000 /dev/urandom > src/deep/blob.bin
echo notes > docs/notes.txt
: > docs/empty
ln src/file1.rs src/deep/linked.rs
ln src/file1.rs docs/linked-too
ln -s ../docs/notes.txt src/pointer
ln -s /nowhere/at/all docs/dangling
truncate -s 5M docs/sparse
printf middle | dd of=docs/sparse bs=1 seek=2500000 conv=notrunc status=none
printf end | dd of=docs/sparse bs=1 seek=5000000 conv=notrunc status=none
chmod 4750 src/file2.rs; chmod 000 src/file3.rs; chmod 1777 empty; chmod 2775 docs
chown rvtest1:rvtest1 src/file4.rs "with space"; chown -h rvtest1 src/pointer
setfattr -n user.comment -v "kept" docs/notes.txt
setfattr -n trusted.root -v 0x00ff10 src/deep
setfacl -m u:rvtest1:rw docs/notes.txt
setfacl -d -m g:rvtest1:r-x docs
mkfifo -m 640 fifo
mknod null c 1 3
echo odd > "$(printf 'a\nnew\033[31mline')"
echo bytes > "$(printf 'not-\377-utf8')"
echo long > "$(printf 'n%.0s' $(seq 255))"
touch -d '2001-02-03T04:05:06.123456789Z' src/file5.rs
touch -d '1965-01-01T00:00:00.5Z' src/file6.rs
touch -h -d '2011-11-11T11:11:11.111111111Z' src/pointer
touch -d '2012-12-12T12:12:12.121212121Z' empty src/deep
"#,
    );
}

/// Changes everything in a [`rich_tree`] by every means there is: rewriting, truncating,
/// punching, appending, renaming around, re-linking, changing metadata, deleting.
#[track_caller]
pub fn wreck(folder: &Path) {
    shell(
        folder,
        r#"
for i in 1 2 3; do seq 1000 > src/file$i.rs; done
printf X | dd of=src/deep/blob.bin bs=1 seek=150000 conv=notrunc status=none
truncate -s 1000 src/file7.rs; : > src/file8.rs; echo appended >> src/file9.rs
fallocate -p -o 0 -l 4096 docs/sparse
mv src/deep docs/moved; mv docs/notes.txt src/deep.txt; mv src/file4.rs src/file5.rs
rm docs/linked-too; ln src/file7.rs docs/linked-too
ln -sfn elsewhere src/pointer
chmod 777 src/file2.rs; chown 1:1 docs src/file6.rs
setfattr -x user.comment src/deep.txt; setfacl -b src/deep.txt; setfacl -k docs
touch src/file6.rs empty
rm -rf "with space" fifo null; mkdir fifo; echo now a file > null
mkdir -p "with space/sub"; echo again > "with space/sub/f"
"#,
    );
}

/// Deletes everything in `folder`.
#[track_caller]
pub fn delete_all(folder: &Path) {
    shell(folder, "find . -mindepth 1 -delete");
    assert_eq!(super::tree::names_in(folder).len(), 0);
}
