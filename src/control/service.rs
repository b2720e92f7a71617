//! The daemon's answers: each request is one call on the filesystem or a report on its catalog.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::prune::{Wanted, prune};
use super::server::Handler;
use super::{DaemonInfo, Request, Response, ScrubRequest};
use crate::error::{Error, Result};
use crate::fs::Filesystem;
use crate::replica::health::State;
use crate::report::condition::{AffectedReport, LagReport};
use crate::report::purge::PurgeReport;
use crate::report::{
    self, Moment, MomentText, PathText, ReplicaReport, SnapshotList, StatusReport,
};
use crate::retention::policy::check_tags;
use crate::types::{Generation, RelPath, Timestamp};
use crate::volume::scrub::ScrubStatus;
use crate::volume::{ReplicaStatus, VolumeStatus};

/// How long a list of snapshots counts what deleting them would free; the rest is counted in the
/// background.
const LIST_TIME: Duration = Duration::from_millis(10);
/// How many snapshots without a name one second may have.
const SAME_SECOND_MAX: u32 = 1000;

/// Answers the requests on a mounted filesystem.
pub struct Service {
    fs: Arc<Filesystem>,
    info: DaemonInfo,
    read_only: bool,
}

impl Service {
    /// Answers on `fs`; `info` is what the daemon says of itself. With `read_only` it refuses what
    /// would change the store.
    pub fn new(fs: Arc<Filesystem>, info: DaemonInfo, read_only: bool) -> Service {
        Service { fs, info, read_only }
    }

    fn check_writable(&self, request: &Request) -> Result<()> {
        if self.read_only && request.is_change() {
            return Err(Error::Refused(format!(
                "{}: it is mounted with -o ro; unmount, then mount without it",
                Error::Posix(rustix::io::Errno::ROFS)
            )));
        }
        Ok(())
    }

    fn moment(&self, wanted: &MomentText) -> Result<Moment> {
        let volume = self.fs.volume();
        report::resolve_moment(volume.catalog(), wanted, || volume.settle())
    }

    fn create(
        &self,
        name: Option<String>,
        at: Option<MomentText>,
        automatic: bool,
        tags: Vec<String>,
    ) -> Result<Response> {
        let tags = check_tags(tags)?;
        let Some(at) = at else {
            let name = self.name_or_time(name, Timestamp::now())?;
            let snapshot = self.fs.create_snapshot(&name, automatic, &tags)?;
            return Ok(Response::Snapshot((&snapshot).into()));
        };
        let moment = self.moment(&at)?;
        let name = self.name_or_time(name, moment.time)?;
        let catalog = self.fs.volume().catalog();
        let snapshot = catalog.create_snapshot(&name, moment.generation, automatic, &tags)?;
        Ok(Response::Snapshot((&snapshot).into()))
    }

    /// The given name, or the time's; of several within one second the later ones are numbered.
    fn name_or_time(&self, name: Option<String>, time: Timestamp) -> Result<String> {
        if let Some(name) = name {
            return Ok(name);
        }
        let catalog = self.fs.volume().catalog();
        let stem = crate::time::snapshot_name(time);
        let mut name = stem.clone();
        for number in 2..=SAME_SECOND_MAX {
            if catalog.snapshot(&name)?.is_none() {
                break;
            }
            name = format!("{stem}_{number}");
        }
        Ok(name)
    }

    fn purge(&self, paths: &[PathText], dry_run: bool, even_held: bool) -> Result<PurgeReport> {
        let volume = self.fs.volume();
        volume.settle()?;
        let paths = paths.iter().map(rel_path).collect::<Result<Vec<_>>>()?;
        let mut plan = report::purge::plan(volume.catalog(), &paths, Timestamp::now())?;
        if dry_run {
            return Ok(plan.report);
        }
        if !plan.report.held.is_empty() && !even_held {
            let names: Vec<String> =
                plan.report.held.iter().map(|name| crate::types::escape(name.as_bytes())).collect();
            return Err(Error::Refused(format!(
                "held snapshots show it: {}. Release them, or purge with --even-held",
                names.join(", ")
            )));
        }
        let purged = volume.purge(&plan.nodes, plan.rows);
        // Even if only a part is gone.
        self.fs.forget_past();
        purged?;
        plan.report.done = true;
        Ok(plan.report)
    }

    /// The files of the catalogs in use.
    fn catalogs(&self) -> Vec<PathBuf> {
        let volume = self.fs.volume();
        volume.replicas().online().filter_map(|id| volume.catalog().file(id)).collect()
    }

    fn scrub(&self, request: ScrubRequest) -> Result<ScrubStatus> {
        let volume = self.fs.volume();
        match request {
            ScrubRequest::Start(options) => volume.scrub_start(options, false)?,
            ScrubRequest::Pause => volume.scrub_pause()?,
            ScrubRequest::Resume => volume.scrub_resume()?,
            ScrubRequest::Stop => volume.scrub_stop()?,
            ScrubRequest::Status => {}
        }
        volume.scrub_status()
    }

    fn status(&self) -> Result<StatusReport> {
        let status = self.fs.volume().status()?;
        let mut report = status_report(&status, self.info.mountpoint.clone());
        // The marker of a replica in use knows those that are not here.
        if let Some(marker) = &status.marker {
            report.replicas.extend(report::absent_replicas(marker, &report.replicas));
        }
        report.degraded = report.replicas.iter().any(|replica| !replica.healthy);
        Ok(report)
    }
}

impl Handler for Service {
    fn handle(&self, request: Request) -> Result<Response> {
        self.check_writable(&request)?;
        let changes = request.is_change();
        let answer = self.answer(request);
        if changes {
            self.fs.await_forgotten();
        }
        answer
    }
}

impl Service {
    fn answer(&self, request: Request) -> Result<Response> {
        let catalog = self.fs.volume().catalog();
        Ok(match request {
            Request::Ping => Response::Pong(self.info.clone()),
            Request::Status => Response::Status(self.status()?),
            Request::ReplicaOnline { .. }
            | Request::ReplicaOffline { .. }
            | Request::ReplicaReplace { .. }
            | Request::ReplicaAdd { .. }
            | Request::ReplicaRemove { .. }
            | Request::Resync => {
                super::replica::change(self.fs.volume(), &request, &self.info)?;
                Response::Status(self.status()?)
            }
            Request::SnapshotCreate { name, at, automatic, tags } => {
                self.create(name, at, automatic, tags)?
            }
            Request::SnapshotList => {
                let snapshots = catalog.snapshots()?;
                let freed = self.fs.volume().freed_by(&snapshots, LIST_TIME)?;
                let totals = catalog.totals()?;
                Response::Snapshots(SnapshotList::new(&snapshots, freed, totals))
            }
            Request::SnapshotDelete { name } => {
                Response::Snapshot((&catalog.delete_snapshot(&name)?).into())
            }
            Request::SnapshotRename { from, to } => {
                Response::Snapshot((&catalog.rename_snapshot(&from, &to)?).into())
            }
            Request::SnapshotHold { name, held } => {
                Response::Snapshot((&catalog.hold_snapshot(&name, held)?).into())
            }
            Request::Prune { policy, dry_run, allow_none, save } => {
                let wanted = Wanted { policy, dry_run, allow_none, save };
                Response::Pruned(prune(self.fs.volume(), wanted)?)
            }
            Request::Log { path, names_max } => {
                Response::Log(report::log::log(catalog, &rel_path(&path)?, names_max)?)
            }
            Request::Diff { a, b, path } => {
                let path = rel_path(&path)?;
                let (a, b) = (self.moment(&a)?, self.moment(&b)?);
                Response::Diff(report::diff(catalog, &a, &b, &path)?)
            }
            Request::Moment { moment } => Response::Moment((&self.moment(&moment)?).into()),
            Request::Check => Response::Checked(crate::check::check_catalogs(&self.catalogs())),
            Request::Scrub(request) => Response::Scrub(self.scrub(request)?),
            Request::Purge { paths, dry_run, even_held } => {
                Response::Purge(self.purge(&paths, dry_run, even_held)?)
            }
            Request::UndoPlan { path, who, since, force } => {
                // What is being written belongs to its writer.
                self.fs.volume().settle()?;
                let since = report::undo_moment(catalog, &since)?;
                let path = rel_path(&path)?;
                Response::UndoPlan(report::undo::plan(catalog, &since, &who, &path, force)?)
            }
            Request::SnapshotView { name, generation } => {
                let at = Generation(generation).min(catalog.generation());
                Response::Snapshot((&catalog.create_snapshot(&name, at, true, &[])?).into())
            }
            Request::SnapshotLastSeen { name, path } => {
                self.fs.volume().settle()?;
                let generation = report::lost::last_seen(catalog, &rel_path(&path)?)?;
                Response::Snapshot((&catalog.create_snapshot(&name, generation, true, &[])?).into())
            }
        })
    }
}

fn rel_path(path: &PathText) -> Result<RelPath> {
    let bytes = path.bytes().ok_or_else(|| Error::Refused("the path is malformed".into()))?;
    Ok(RelPath::parse(bytes)?)
}

fn status_report(status: &VolumeStatus, mountpoint: PathText) -> StatusReport {
    let replicas: Vec<_> = status.replicas.iter().map(replica_report).collect();
    StatusReport {
        store: status.uuid.to_string(),
        mountpoint: Some(mountpoint),
        degraded: false,
        read_only: !status.writable,
        replicas,
        totals: status.totals,
        oldest: report::time_text(status.oldest),
        generation: status.generation.0,
        warning: status.warning.clone(),
        scrub: Box::new(status.scrub.clone()),
    }
}

fn replica_report(replica: &ReplicaStatus) -> ReplicaReport {
    use std::os::unix::ffi::OsStrExt;
    let health = &replica.health;
    let (state, since, error) = match &health.state {
        State::Online => ("online", None, None),
        State::Offline { since, fault } => {
            ("offline", Some(report::time_text(*since)), Some(fault.to_string()))
        }
        State::Resyncing { since } => ("resyncing", Some(report::time_text(*since)), None),
    };
    let space = replica.space.as_ref();
    let foreign = replica.foreign.as_ref();
    ReplicaReport {
        label: replica.label.clone(),
        path: PathText::new(replica.path.as_os_str().as_bytes()),
        uuid: replica.uuid.to_string(),
        state: state.into(),
        healthy: health.state == State::Online,
        since,
        error,
        read_errors: health.read_errors,
        write_errors: health.write_errors,
        checksum_errors: health.checksum_errors,
        lag: replica
            .lag
            .map(|(generations, time)| LagReport { generations, seconds: time.as_secs() }),
        affected: replica.failures.iter().map(AffectedReport::from).collect(),
        resync: replica.resync.clone().map(Into::into),
        foreign: foreign.map_or_else(Vec::new, |foreign| foreign.lines.clone()),
        foreign_count: foreign.map_or(0, |foreign| foreign.count),
        space_bytes: space.map_or(0, |space| space.blocks.saturating_mul(space.block_bytes)),
        available_bytes: space.map_or(0, |space| space.available.saturating_mul(space.block_bytes)),
    }
}
