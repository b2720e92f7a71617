//! `rearview status`

use std::os::unix::ffi::OsStrExt;

use super::locate::{locate, unexpected};
use super::{Exit, StatusArgs, text};
use crate::catalog::Catalog;
use crate::control::{Request, Response};
use crate::error::Result;
use crate::report::condition::LagReport;
use crate::report::{self, PathText, ReplicaReport, StatusReport};
use crate::types::escape;
use crate::volume::scrub::ScrubStatus;

/// So many of the paths that something failed on are listed for each replica.
const AFFECTED_SHOWN_MAX: usize = 10;

/// `rearview status`
pub fn status(args: &StatusArgs) -> Result<Exit> {
    let located = locate(&args.path)?;
    let backing = located.first_backing();
    let response = located.ask_or_look(&Request::Status, |catalog| {
        Ok(Response::Status(unmounted(catalog, &backing)?))
    })?;
    let Response::Status(report) = response else { return Err(unexpected()) };
    if args.json {
        text::print_json(&report)?;
    } else {
        text::print(&status_text(&report))?;
    }
    Ok(match (report.degraded, report.scrub.damage.is_empty()) {
        (true, _) => Exit::Degraded,
        (false, false) => Exit::Damaged,
        (false, true) => Exit::Done,
    })
}

/// What the catalog of an unmounted store tells.
fn unmounted(catalog: &Catalog, backing: &std::path::Path) -> Result<StatusReport> {
    let info = crate::store::inspect(backing)?;
    let space = rustix::fs::statvfs(backing).ok();
    let replica = ReplicaReport {
        label: info.marker.label.clone(),
        path: PathText::new(backing.as_os_str().as_bytes()),
        uuid: info.marker.replica.to_string(),
        state: "not mounted".into(),
        healthy: true,
        since: None,
        error: None,
        read_errors: 0,
        write_errors: 0,
        checksum_errors: 0,
        lag: None,
        affected: Vec::new(),
        resync: None,
        foreign: Vec::new(),
        foreign_count: 0,
        space_bytes: space.as_ref().map_or(0, |space| space.f_blocks * space.f_frsize),
        available_bytes: space.as_ref().map_or(0, |space| space.f_bavail * space.f_frsize),
    };
    let mut replicas = vec![replica];
    // Unmounted, the others are neither here nor missing: where they were is all that is known.
    for mut other in report::absent_replicas(&info.marker, &replicas) {
        if other.state == "absent" {
            other.state = "not looked at".into();
            other.healthy = true;
        }
        replicas.push(other);
    }
    Ok(StatusReport {
        store: info.marker.store.to_string(),
        mountpoint: None,
        degraded: replicas.iter().any(|replica| !replica.healthy),
        read_only: false,
        replicas,
        totals: catalog.totals()?,
        oldest: report::time_text(catalog.time_of(catalog.oldest()?)?),
        generation: catalog.generation().0,
        warning: None,
        scrub: Box::new(ScrubStatus::of(catalog)?),
    })
}

/// The order of `zpool status`: what it is, how it is, what to do, the parts, the sums.
fn status_text(report: &StatusReport) -> String {
    let mut out = String::new();
    let mut line = |key: &str, value: &str| out.push_str(&format!("{key:>9}: {value}\n"));
    line("store", &report.store);
    let state = match (&report.mountpoint, report.degraded) {
        (None, _) => "NOT MOUNTED",
        (Some(_), _) if report.read_only => "READ-ONLY",
        (Some(_), true) => "DEGRADED",
        (Some(_), false) => "ONLINE",
    };
    line("state", state);
    if report.degraded {
        let failed = report.replicas.iter().filter(|replica| !replica.healthy);
        let names: Vec<String> = failed.map(|replica| replica.path.shown()).collect();
        line("status", &format!("not current or not reachable: {}", names.join(", ")));
        if report.read_only {
            line("status", "fewer replicas are in use than the mount asks for: writes are refused");
        }
        line(
            "action",
            "the mount goes on with the other replicas; bring the disk back and run 'rearview \
             replica online', exchange it with 'rearview replica replace', or give it up with \
             'rearview replica remove NAME'",
        );
    }
    if !report.scrub.damage.is_empty() {
        line("status", "a scrub found damage that it could not heal: it is listed below");
        line(
            "action",
            "restore those files from a snapshot or a backup, then have all looked at again by \
             'rearview scrub start --all'",
        );
    }
    if let Some(mountpoint) = &report.mountpoint {
        line("mount", &mountpoint.shown());
    }
    for replica in &report.replicas {
        if let Some(scan) = scan_text(replica) {
            line("scan", &scan);
        }
    }
    if let Some(run) = report.scrub.run.as_ref().or(report.scrub.last.as_ref()) {
        line("scan", &super::scrub::run_text(run));
    }
    out.push_str(&replicas_text(report));
    out.push_str(&damage_text(report));
    totals_text(report, &mut out);
    out
}

/// The table of replicas, with a blank line before and after it.
pub(super) fn replicas_text(report: &StatusReport) -> String {
    let mut out = String::new();
    let mut rows = vec![
        vec!["NAME", "STATE", "READ", "WRITE", "CKSUM", "LAG", "FREE", "SIZE", "SINCE"]
            .into_iter()
            .map(String::from)
            .collect(),
    ];
    rows.extend(report.replicas.iter().map(replica_row));
    out.push('\n');
    for row in text::table(&rows).lines() {
        out.push_str(&format!("  {row}\n"));
    }
    for replica in &report.replicas {
        if let Some(error) = &replica.error {
            let error = escape(error.as_bytes());
            out.push_str(&format!("  {}: {error}\n", replica.path.shown()));
        }
        if replica.foreign_count > 0 {
            let (count, path) = (replica.foreign_count, replica.path.shown());
            out.push_str(&format!("  {path}: {count} paths were changed there by others:\n"));
            for told in &replica.foreign {
                out.push_str(&format!("    {}\n", escape(told.as_bytes())));
            }
        }
    }
    out.push_str(&affected_text(report));
    out.push('\n');
    out
}

/// What failed on which path, as `zpool status -v` lists it.
fn affected_text(report: &StatusReport) -> String {
    let mut out = String::new();
    for replica in report.replicas.iter().filter(|replica| !replica.affected.is_empty()) {
        let count = replica.affected.len();
        out.push_str(&format!("\n  what failed on {}, by path:\n", replica.path.shown()));
        for affected in replica.affected.iter().rev().take(AFFECTED_SHOWN_MAX) {
            let path = affected.path.as_ref().map_or_else(|| "-".into(), PathText::shown);
            let time = text::local_time(&affected.time);
            out.push_str(&format!("    {time}  {path}: {}: {}\n", affected.op, affected.error));
        }
        if count > AFFECTED_SHOWN_MAX {
            let more = count - AFFECTED_SHOWN_MAX;
            out.push_str(&format!("    and {more} more: see --json\n"));
        }
    }
    out
}

/// What no scrub could heal, with a blank line after it.
fn damage_text(report: &StatusReport) -> String {
    let damage = &report.scrub.damage;
    if damage.is_empty() {
        return String::new();
    }
    let mut out = "  damage that could not be healed:\n".to_string();
    damage
        .iter()
        .take(AFFECTED_SHOWN_MAX)
        .for_each(|finding| out.push_str(&format!("    {finding}\n")));
    if damage.len() > AFFECTED_SHOWN_MAX {
        let more = damage.len() - AFFECTED_SHOWN_MAX;
        out.push_str(&format!("    and {more} more: see --json\n"));
    }
    out.push('\n');
    out
}

/// What a resync does, as `zpool status` says it.
pub(super) fn scan_text(replica: &ReplicaReport) -> Option<String> {
    let resync = replica.resync.as_ref()?;
    let path = replica.path.shown();
    let left = |secs: u64| format!("{:02}:{:02}:{:02}", secs / 3600, secs / 60 % 60, secs % 60);
    match resync.stage.as_str() {
        "waiting" => Some(format!("resync of {path} waits for its turn")),
        "running" => {
            let (done, total) = (text::size(resync.bytes), text::size(resync.bytes_total));
            let mut scan =
                format!("resync of {path} in progress, {done} of {total}, {} %", resync.percent);
            if let Some(secs) = resync.left_secs {
                scan.push_str(&format!(", {} to go", left(secs)));
            }
            Some(scan)
        }
        "retry" => {
            let secs = resync.left_secs.unwrap_or(0);
            Some(format!("{path} is looked at again in {}", left(secs)))
        }
        _ => None,
    }
}

fn totals_text(report: &StatusReport, out: &mut String) {
    let totals = &report.totals;
    let mut line = |key: &str, value: String| out.push_str(&format!("{key:>9}: {value}\n"));
    let live = text::size(totals.live_bytes);
    line("live", format!("{live} in {} files and directories", totals.live_nodes));
    let history = text::size(totals.history_bytes());
    line("history", format!("{history} in {} past versions", totals.past_versions));
    let waiting = totals.undo_bytes + totals.preserved_bytes;
    if waiting > 0 {
        let waiting = text::size(waiting);
        line("packs", format!("{}; {waiting} wait to be packed", text::size(totals.packed_bytes)));
    }
    if totals.cloned_bytes > 0 {
        let cloned = text::size(totals.cloned_bytes);
        line("clones", format!("{cloned}, of which they take what changed since"));
    }
    if let Some(warning) = &report.warning {
        line("space", warning.clone());
    }
    line("snapshots", totals.snapshots.to_string());
    line("oldest", text::local_time(&report.oldest));
}

fn replica_row(replica: &ReplicaReport) -> Vec<String> {
    let path = replica.path.shown();
    let name = match replica.label.as_str() {
        "" => path,
        label => format!("{} ({path})", escape(label.as_bytes())),
    };
    vec![
        name,
        escape(replica.state.as_bytes()).to_uppercase(),
        replica.read_errors.to_string(),
        replica.write_errors.to_string(),
        replica.checksum_errors.to_string(),
        replica.lag.map(lag_text).unwrap_or_else(|| "-".into()),
        text::size(replica.available_bytes),
        text::size(replica.space_bytes),
        replica.since.as_deref().map(text::local_time).unwrap_or_default(),
    ]
}

fn lag_text(lag: LagReport) -> String {
    match lag.generations {
        0 => "0".into(),
        generations => format!("{generations} ({} s)", lag.seconds),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_degraded_store_says_which_replica_and_what_to_do() {
        let replica = |path: &str, healthy: bool| ReplicaReport {
            label: String::new(),
            path: PathText::new(path.as_bytes()),
            uuid: String::new(),
            state: if healthy { "online" } else { "offline" }.into(),
            healthy,
            since: None,
            error: (!healthy).then(|| "I/O error".to_string()),
            read_errors: 0,
            write_errors: u64::from(!healthy),
            checksum_errors: 0,
            lag: Some(LagReport { generations: u64::from(!healthy), seconds: 7 }),
            affected: Vec::new(),
            resync: None,
            foreign: Vec::new(),
            foreign_count: 0,
            space_bytes: 1 << 30,
            available_bytes: 1 << 20,
        };
        let report = StatusReport {
            store: "u".into(),
            mountpoint: Some(PathText::new(b"/m")),
            degraded: true,
            read_only: false,
            replicas: vec![replica("/a", true), replica("/b", false)],
            totals: Default::default(),
            oldest: "2026-11-22T19:30:00Z".into(),
            generation: 7,
            warning: None,
            scrub: Default::default(),
        };
        let text = status_text(&report);
        for part in
            ["1 (7 s)", "state: DEGRADED", "reachable: /b", "action:", "OFFLINE", "/b: I/O error"]
        {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["replicas"][1]["path"], "/b");
    }
}
