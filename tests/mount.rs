//! Mounting, refusing to mount, adopting folders, and every way a mount ends.

mod common;

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use common::fixture::rich_tree;
use common::mounted::word;
use common::run::{binary, rearview, run_shell};
use common::tree::{assert_same, assert_trees, names_in, read_tree};
use common::user::{ordinary_user, other_user, public_binary};
use common::{Done, Mounted, daemon_of, mounts_at, need, run, shell, wait_until};

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

/// Mounts `backings` at `mnt` with no options at all.
fn mount_plain(backings: &[&Path], mnt: &Path) -> Done {
    let mut words: Vec<OsString> = vec!["mount".into()];
    words.extend(backings.iter().map(|path| path.as_os_str().to_owned()));
    words.push(mnt.into());
    rearview(words)
}

/// Fails unless the mount was refused with one of `codes` and a text that has `words`, and
/// nothing is mounted.
#[track_caller]
fn refused(done: Done, codes: &[i32], words: &[&str], mnt: &Path) {
    assert!(codes.contains(&done.code), "expected one of {codes:?}: {}", done.told());
    let code = done.code;
    done.fails(code, words);
    assert!(mounts_at(mnt).is_empty(), "refused, but mounted");
    wait_until("no daemon stays after a refusal", 20, || daemon_of(mnt).is_none());
}

#[test]
fn empty_and_new_backings_become_a_store() {
    let mut store = Mounted::unmounted(1);
    store.backings.push(store.beside("not-there-yet"));
    store.mount().ok();
    fs::write(store.path("f"), "both").unwrap();
    for backing in &store.backings {
        assert_eq!(fs::read_to_string(backing.join("f")).unwrap(), "both");
        let private = fs::metadata(backing.join(".rearview")).unwrap();
        assert_eq!(private.mode() & 0o7777, 0o700);
        assert!(backing.join(".rearview/store.toml").is_file());
    }
    let (_, kind) = mounts_at(&store.mnt).remove(0);
    assert_eq!(kind, "fuse.rearview");
    store.finish();
}

#[test]
fn eight_backings_work_and_nine_are_refused() {
    let mut store = Mounted::with_replicas(8);
    fs::write(store.path("f"), "eight").unwrap();
    store.unmount();
    store.assert_replicas_identical();
    store.backings.push(store.beside("ninth"));
    let mnt = store.mnt.clone();
    refused(store.mount(), &[1, 2], &["8"], &mnt);
}

#[test]
fn a_folder_with_files_is_adopted_and_the_empty_ones_are_filled() {
    let mut store = Mounted::unmounted(3);
    rich_tree(&store.backings[0]);
    let was = read_tree(&store.backings[0]);
    let done = store.mount();
    assert_eq!(done.code, 0, "{}", done.told());
    assert_trees("the mount shows the adopted files", &was, &read_tree(&store.mnt));
    store.unmount();
    assert_trees("the adopted folder is as it was", &was, &read_tree(&store.backings[0]));
    store.assert_replicas_identical();
    for backing in &store.backings {
        let sparse = fs::metadata(backing.join("docs/sparse")).unwrap();
        assert!(sparse.blocks() * 512 < 1 << 20, "holes are kept: {} blocks", sparse.blocks());
    }
}

#[test]
fn the_folder_with_files_may_stand_second() {
    let mut store = Mounted::unmounted(2);
    rich_tree(&store.backings[1]);
    let was = read_tree(&store.backings[1]);
    store.mount().ok();
    assert_trees("adopted", &was, &read_tree(&store.mnt));
    store.finish();
}

#[test]
fn an_interrupted_fill_is_resumed() {
    let mut store = Mounted::unmounted(2);
    let source = store.backings[0].clone();
    for i in 0..6_000 {
        let folder = source.join(format!("d{}", i % 50));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("f{i}")), vec![(i % 256) as u8; 3_000]).unwrap();
    }
    let was = read_tree(&source);
    let mut mounting = Command::new(binary())
        .arg("mount")
        .arg("-f")
        .args(&store.backings)
        .arg(&store.mnt)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let target = store.backings[1].clone();
    wait_until("the fill begins", 60, || {
        fs::read_dir(&target).is_ok_and(|list| list.count() > 3) || store.is_mounted()
    });
    mounting.kill().unwrap();
    mounting.wait().unwrap();
    run(Command::new("umount").arg("-l").arg(&store.mnt));
    store.mount().ok();
    assert_trees("nothing is missing", &was, &read_tree(&store.mnt));
    store.finish();
}

#[test]
fn backings_may_be_one_word_with_colons() {
    let mut store = Mounted::unmounted(2);
    let both = format!("{}:{}", word(&store.backings[0]), word(&store.backings[1]));
    store.mount_only(&[PathBuf::from(both)]).ok();
    fs::write(store.path("f"), "x").unwrap();
    store.finish();
}

#[test]
fn mount_8_mounts_it_from_an_fstab_line() {
    let mut store = Mounted::unmounted(2);
    let helper = store.beside("mount.fuse.rearview");
    std::os::unix::fs::symlink(binary(), &helper).unwrap();
    let both = format!("{}:{}", word(&store.backings[0]), word(&store.backings[1]));
    let mnt = store.mnt.clone();
    let by_argv0 =
        |options: &str| run(Command::new(&helper).arg(&both).arg(&mnt).args(["-o", options]));
    // It opens stores and makes none.
    by_argv0("defaults").fails(10, &["rearview mount"]);
    store.mount().ok();
    store.unmount();
    by_argv0("rw,nofail,_netdev,noatime,x-systemd.requires=x,user,allow_other,dev,suid").ok();
    assert!(store.is_mounted());
    fs::write(store.path("f"), "by fstab").unwrap();
    store.unmount();
    by_argv0("defaults").ok();
    assert_eq!(fs::read_to_string(store.path("f")).unwrap(), "by fstab");
    store.finish();
}

#[test]
fn remounting_shows_the_same_files_in_any_order_and_place() {
    let mut store = Mounted::unmounted(2);
    store.mount().ok();
    rich_tree(&store.path("work"));
    let was = read_tree(&store.mnt);
    store.remount();
    assert_trees("after a remount", &was, &read_tree(&store.mnt));
    store.unmount();
    // A backing is known by its identity, not by its path or position.
    let moved = store.beside("moved");
    fs::rename(&store.backings[0], &moved).unwrap();
    store.backings = vec![store.backings[1].clone(), moved];
    store.mount().ok();
    assert_trees("after moving a backing", &was, &read_tree(&store.mnt));
    store.finish();
}

#[test]
fn one_backing_alone_is_enough_and_the_other_catches_up() {
    let mut store = Mounted::unmounted(2);
    store.mount().ok();
    fs::write(store.path("f"), "both").unwrap();
    store.unmount();
    let second = store.backings[1].clone();
    store.mount_only(&[second]).ok();
    assert_eq!(fs::read_to_string(store.path("f")).unwrap(), "both");
    store.unmount();
    store.mount().ok();
    assert_eq!(fs::read_to_string(store.path("f")).unwrap(), "both");
    store.finish();
}

#[test]
fn mountpoints_in_around_or_on_a_backing_are_refused() {
    let store = Mounted::unmounted(2);
    let [a, b] = [&store.backings[0], &store.backings[1]];
    fs::write(a.join("precious"), "x").unwrap();
    let inside = a.join("inside");
    fs::create_dir(&inside).unwrap();
    refused(mount_plain(&[a, b], &inside), &[1, 2], &["mountpoint"], &inside);
    let around = store.beside("");
    refused(mount_plain(&[a, b], &around), &[1, 2], &["mountpoint"], &store.mnt);
    // Through a symlink it is the same place.
    let link = store.beside("link");
    std::os::unix::fs::symlink(&inside, &link).unwrap();
    refused(mount_plain(&[a, b], &link), &[1, 2], &["mountpoint"], &inside);
    assert!(!a.join(".rearview").exists(), "a refusal leaves no trace");
    assert!(!b.join(".rearview").exists(), "a refusal leaves no trace");
    assert_eq!(fs::read_to_string(a.join("precious")).unwrap(), "x");
}

#[test]
fn a_backing_in_a_backing_or_twice_is_refused() {
    let store = Mounted::unmounted(1);
    let a = &store.backings[0];
    let inside = a.join("inside");
    fs::create_dir(&inside).unwrap();
    refused(mount_plain(&[a, &inside], &store.mnt), &[1, 2], &["inside"], &store.mnt);
    refused(mount_plain(&[a, a], &store.mnt), &[1, 2], &["same directory"], &store.mnt);
    assert!(!a.join(".rearview").exists(), "a refusal leaves no trace");
}

#[test]
fn a_backing_of_another_store_is_refused() {
    let mut one = Mounted::new();
    let mut two = Mounted::new();
    fs::write(one.path("f"), "one").unwrap();
    fs::write(two.path("f"), "two").unwrap();
    one.unmount();
    two.unmount();
    let mixed = [one.backings[0].as_path(), two.backings[0].as_path()];
    refused(mount_plain(&mixed, &one.mnt), &[1], &["store"], &one.mnt);
    assert_eq!(fs::read_to_string(one.backings[0].join("f")).unwrap(), "one");
    assert_eq!(fs::read_to_string(two.backings[0].join("f")).unwrap(), "two");
}

#[test]
fn two_folders_with_different_files_are_refused() {
    let store = Mounted::unmounted(2);
    fs::write(store.backings[0].join("mine"), "1").unwrap();
    fs::write(store.backings[1].join("yours"), "2").unwrap();
    let [a, b] = [&store.backings[0], &store.backings[1]];
    refused(mount_plain(&[a, b], &store.mnt), &[1], &["files"], &store.mnt);
    assert_eq!(names_in(a), ["mine"]);
    assert_eq!(names_in(b), ["yours"]);
}

#[test]
fn an_empty_folder_where_a_replica_should_be_is_refused() {
    let mut store = Mounted::unmounted(2);
    store.mount().ok();
    fs::write(store.path("f"), "x").unwrap();
    store.unmount();
    // The disk of the second backing is not mounted: its mountpoint is an empty folder.
    fs::rename(&store.backings[1], store.beside("unplugged")).unwrap();
    fs::create_dir(&store.backings[1]).unwrap();
    let [a, b] = [store.backings[0].clone(), store.backings[1].clone()];
    refused(mount_plain(&[&a, &b], &store.mnt), &[1, 10], &["mounted"], &store.mnt);
    assert_eq!(names_in(&b).len(), 0, "nothing is written to it");
    fs::remove_dir(&b).unwrap();
    fs::rename(store.beside("unplugged"), &b).unwrap();
    store.mount().ok();
    store.finish();
}

#[test]
fn a_store_in_use_is_refused_and_says_by_whom() {
    let store = Mounted::new();
    let elsewhere = store.beside("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let [a, b] = [&store.backings[0], &store.backings[1]];
    let daemon = store.daemon().to_string();
    refused(mount_plain(&[a, b], &elsewhere), &[11], &["in use", &daemon], &elsewhere);
    refused(mount_plain(&[b], &elsewhere), &[11], &["in use"], &elsewhere);
    let again = mount_plain(&[a, b], &store.mnt);
    assert_eq!(again.code, 11, "{}", again.told());
    fs::write(store.path("f"), "still works").unwrap();
    store.finish();
}

#[test]
fn a_newer_format_is_refused() {
    let mut store = Mounted::new();
    store.unmount();
    for backing in &store.backings {
        let marker = backing.join(".rearview/store.toml");
        let text = fs::read_to_string(&marker).unwrap();
        let line = text.lines().find(|line| line.starts_with("format")).expect("a format line");
        let newer = format!("{} = 9999", line.split('=').next().unwrap().trim());
        fs::write(&marker, text.replace(line, &newer)).unwrap();
    }
    let mnt = store.mnt.clone();
    refused(store.mount(), &[1], &["9999"], &mnt);
}

#[test]
fn missing_and_wrong_mountpoints_are_refused() {
    let store = Mounted::unmounted(1);
    let a = &store.backings[0];
    let missing = store.beside("no/such/place");
    refused(mount_plain(&[a], &missing), &[1, 2], &["no/such/place"], &missing);
    refused(mount_plain(&[&missing], &store.mnt), &[1, 2], &["no/such/place"], &store.mnt);
    let file = store.beside("file");
    fs::write(&file, "x").unwrap();
    refused(mount_plain(&[a], &file), &[1, 2], &["director"], &file);
    refused(mount_plain(&[&file], &store.mnt), &[1, 2], &["director"], &store.mnt);
    refused(rearview(["mount"]), &[2], &["usage"], &store.mnt);
    refused(rearview(["mount", word(&store.mnt).as_str()]), &[2], &[], &store.mnt);
}

#[test]
fn a_machine_without_dev_fuse_is_told_what_to_do() {
    need(&["unshare"]);
    // Not below /dev, where scratch folders usually are: that is what is taken away here.
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    shell(folder.path(), "mkdir a mnt");
    let script = format!(
        "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; exec {:?} mount a mnt",
        binary()
    );
    let mut command = Command::new("unshare");
    command.args(["-m", "bash", "-c", &script]).current_dir(folder.path());
    run(&mut command).fails(1, &["/dev/fuse", "modprobe"]);
}

#[test]
fn a_stale_mount_is_cleared_and_the_store_recovers() {
    let mut store = Mounted::new();
    rich_tree(&store.path("work"));
    store.snapshot("s");
    let was = read_tree(&store.path("work"));
    fs::write(store.path("late"), "written just before").unwrap();
    store.kill();
    let dead = fs::read_dir(&store.mnt).expect_err("a dead mount is an error, not empty");
    // The very first call may still see the connection break.
    let errno = Errno::from_io_error(&dead);
    assert!(matches!(errno, Some(Errno::NOTCONN | Errno::CONNABORTED)), "{dead}");
    store.mount().ok();
    assert_eq!(fs::read_to_string(store.path("late")).unwrap(), "written just before");
    assert_trees("live", &was, &read_tree(&store.path("work")));
    assert_trees("the snapshot", &was, &read_tree(&store.past("s").join("work")));
    store.finish();
}

/// Starts `mount -f` and waits until it answers.
fn foreground(store: &Mounted) -> Child {
    let child = Command::new(binary())
        .args(["mount", "-f"])
        .args(&store.backings)
        .arg(&store.mnt)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("it is mounted", 30, || store.is_mounted());
    child
}

#[test]
fn in_the_foreground_it_stays_until_a_signal_ends_it_cleanly() {
    for end in [Signal::TERM, Signal::INT] {
        let store = Mounted::unmounted(2);
        let mut child = foreground(&store);
        fs::write(store.path("f"), "kept").unwrap();
        assert!(child.try_wait().unwrap().is_none(), "it stays");
        signal(child.id(), end);
        let status = child.wait().unwrap();
        assert!(
            status.code().is_some_and(|code| code == 0 || code == 130),
            "{end:?} ended it with {status}"
        );
        assert!(mounts_at(&store.mnt).is_empty());
        assert_eq!(fs::read_to_string(store.backings[1].join("f")).unwrap(), "kept");
        store.assert_replicas_identical();
    }
}

#[test]
fn every_way_of_unmounting_ends_the_daemon_and_loses_nothing() {
    type End = fn(&Mounted);
    let ways: [(&str, End); 4] = [
        ("umount", |store| drop(run(Command::new("umount").arg(&store.mnt)).ok())),
        ("fusermount3 -u", |store| {
            drop(run(Command::new("fusermount3").arg("-u").arg(&store.mnt)).ok());
        }),
        ("SIGTERM", |store| signal(store.daemon(), Signal::TERM)),
        ("SIGINT", |store| signal(store.daemon(), Signal::INT)),
    ];
    let mut store = Mounted::unmounted(2);
    for (way, end) in ways {
        store.mount().ok();
        fs::write(store.path(way), way).unwrap();
        store.snapshot(&way.replace(' ', "-"));
        end(&store);
        store.ended_elsewhere();
        store.assert_replicas_identical();
    }
    store.mount().ok();
    for (way, _) in ways {
        assert_eq!(fs::read_to_string(store.path(way)).unwrap(), way);
        let past = store.past(&way.replace(' ', "-")).join(way);
        assert_eq!(fs::read_to_string(past).unwrap(), way);
    }
    store.finish();
}

#[test]
fn a_busy_mount_is_not_torn_away() {
    let mut store = Mounted::new();
    let open = fs::File::create(store.path("open")).unwrap();
    let done = rearview([OsString::from("umount"), store.mnt.clone().into()]);
    assert_ne!(done.code, 0, "{}", done.told());
    assert!(done.stderr.to_lowercase().contains("busy") || done.stderr.contains("in use"));
    fs::write(store.path("f"), "still served").unwrap();
    drop(open);
    store.unmount();
    store.assert_replicas_identical();
}

#[test]
fn umount_of_what_is_not_ours_says_so() {
    let store = Mounted::unmounted(1);
    let done = rearview(["umount", word(&store.mnt).as_str()]);
    assert!([1, 10].contains(&done.code), "{}", done.told());
    let code = done.code;
    done.fails(code, &["mounted"]);
}

#[test]
fn an_ordinary_user_mounts_with_fusermount3() {
    let store = Mounted::unmounted(0);
    let user = ordinary_user();
    let (_folder, copy) = public_binary();
    fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
    let home = store.beside("home");
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(user.uid), Some(user.gid)).unwrap();
    let script = format!(
        "cd {home:?}; mkdir a b mnt; echo adopted > a/f
         {copy:?} mount a b mnt
         trap '{copy:?} umount {home:?}/mnt' EXIT
         test \"$(cat mnt/f)\" = adopted
         echo new > mnt/f; mkdir mnt/d; mv mnt/f mnt/d/g; ln mnt/d/g mnt/d/h
         {copy:?} snapshot create mnt snap
         rm -r mnt/d
         test \"$(cat mnt/.snapshots/snap/d/h)\" = new
         cp -a mnt/.snapshots/snap/d mnt/
         {copy:?} status mnt
         trap - EXIT
         {copy:?} umount mnt
         ls -A a b"
    );
    let done = user.shell(&script);
    let (a, b) = (home.join("a"), home.join("b"));
    run(Command::new("umount").arg("-q").arg(home.join("mnt")));
    done.ok();
    assert_same("the user's replicas", &a, &b);
    assert_eq!(fs::read_to_string(b.join("d/g")).unwrap(), "new\n");
    assert_eq!(fs::metadata(b.join("d/g")).unwrap().uid(), user.uid);
}

#[test]
fn an_ordinary_user_without_fusermount3_is_told_to_install_it() {
    let store = Mounted::unmounted(0);
    let user = ordinary_user();
    let (_folder, copy) = public_binary();
    fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
    let home = store.beside("home");
    fs::create_dir_all(home.join("a")).unwrap();
    fs::create_dir_all(home.join("mnt")).unwrap();
    shell(&home, &format!("chown -R {0}:{0} .", user.uid));
    let mut command = user.command(copy.to_str().unwrap());
    command.arg("mount").arg(home.join("a")).arg(home.join("mnt")).env("PATH", "/nonexistent");
    run(&mut command).fails(1, &["fuse3"]);
}

#[test]
fn only_the_owner_speaks_to_the_daemon() {
    let store = Mounted::new();
    fs::write(store.path("f"), "x").unwrap();
    let (_folder, copy) = public_binary();
    let stranger = other_user();
    let done = stranger.shell(&format!("{copy:?} snapshot create {:?} mine", store.mnt));
    assert_ne!(done.code, 0, "{}", done.told());
    assert!(!store.past("mine").exists());
    let socket = store.backings[0].join(".rearview/control.sock");
    let meta = fs::symlink_metadata(&socket).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.mode() & 0o077, 0, "nobody else may connect");
    store.finish();
}

#[test]
fn the_daemon_keeps_nothing_of_its_caller() {
    let store = Mounted::new();
    let daemon = store.daemon();
    let cwd = fs::read_link(format!("/proc/{daemon}/cwd")).unwrap();
    assert_eq!(cwd, Path::new("/"), "it does not pin the folder it was started in");
    let name = fs::read_to_string(format!("/proc/{daemon}/comm")).unwrap();
    assert_eq!(name, "rearview\n", "ps and fuser tell what it is");
    for fd in 0..3 {
        let target = fs::read_link(format!("/proc/{daemon}/fd/{fd}")).unwrap();
        assert!(!target.starts_with("/dev/shm") && !target.to_string_lossy().contains("(deleted)"));
    }
    // A pipe of the caller would hang `rearview mount ... | tee`.
    let done = run_shell(Path::new("/"), &format!("timeout 60 cat < /dev/null; ls /proc/{daemon}"));
    assert_eq!(done.code, 0);
    store.finish();
}
