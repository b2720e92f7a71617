//! Full disks: small ext4 images, as root only.

use std::process::Command;

use super::*;

/// A mounted image; unmounted when dropped.
pub(super) struct Image(PathBuf);

impl Image {
    pub(super) fn new(bench: &Bench, megabytes: u64) -> Option<Image> {
        let (file, dir) = (bench.path("image"), bench.path("small"));
        fs::File::create(&file).unwrap().set_len(megabytes << 20).unwrap();
        fs::create_dir(&dir).unwrap();
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&file).status();
        if !is_root() || !made.is_ok_and(|status| status.success()) {
            return None;
        }
        let mounted = Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&dir).status();
        mounted.is_ok_and(|status| status.success()).then_some(Image(dir))
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(&self.0).status();
        assert!(done.is_ok_and(|status| status.success()), "umount {}", self.0.display());
    }
}

#[test]
fn a_copy_that_does_not_fit_is_refused_with_both_numbers() {
    let bench = Bench::new();
    let Some(_image) = Image::new(&bench, 24) else { return };
    write(&bench.path("a/big"), &vec![1; 40 << 20]);
    let error = bench.open(&["a", "small"]).err().unwrap().to_string();
    assert!(error.contains("40.") && error.contains("available"), "{error}");
    fs::write(bench.path("a/big"), b"small enough").unwrap();
    bench.settle(&["a", "small"]);
    assert!(bench.path("small/lost+found").exists(), "the filesystem's own directory stays");
}

#[test]
fn a_disk_that_fills_up_is_named_and_the_next_mount_goes_on() {
    let bench = Bench::new();
    let Some(_image) = Image::new(&bench, 24) else { return };
    // The bytes fit, the inodes do not: something else on that disk has taken them.
    for number in 0..5000 {
        write(&bench.path(&format!("small/other/{number}")), b"");
    }
    for number in 0..3000 {
        write(&bench.path(&format!("a/{}/{number}", number % 10)), b"");
    }
    let error = bench.open(&["a", "small/b"]).err().unwrap().to_string();
    assert!(error.contains("is full") && error.contains("/small/b"), "{error}");
    // Still full, and still in need of help, but the other backing works alone.
    assert!(bench.open(&["a", "small/b"]).is_err());
    bench.settle(&["a"]);
    fs::remove_dir_all(bench.path("small/other")).unwrap();
    bench.settle(&["a", "small/b"]);
}

#[test]
fn a_replica_that_is_too_small_to_be_brought_up_stays_what_it_was() {
    let bench = Bench::new();
    let Some(_image) = Image::new(&bench, 24) else { return };
    write(&bench.path("a/f"), b"x");
    bench.settle(&["a", "small"]);
    drop(bench.open(&["a"]).unwrap());
    bench.lose_logs();
    write(&bench.path("a/big"), &vec![1; 40 << 20]);
    let error = bench.open(&["a", "small"]).err().unwrap().to_string();
    assert!(error.contains("not enough space"), "{error}");
    assert!(inspect(&bench.path("small")).unwrap().clean);
}
