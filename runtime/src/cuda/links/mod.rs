//! Collectives between the devices of the ranks, by NCCL: the values stay in device memory, and the host goes on while
//! they travel.
//!
//! All ranks decide together, when their sessions open, whether NCCL carries the program's collectives or host memory
//! does (`choose`); then every group of ranks that the program's collectives name gets a [`Clique`]. `convert` brings
//! conversions between layouts into the form that NCCL knows, `lookout` notices what keeps a collective from ever being
//! done. What NCCL cannot do as the ranks' communicator does it ([`carries`]) goes through host memory, on all ranks
//! alike.
//!
//! What must not live here: calls of NCCL, which are in `tpshard_driver`.

mod choose;
mod convert;
mod ending;
mod lookout;
mod staging;
#[cfg(test)]
mod tests;

pub(super) use convert::{Operand, carries};
pub(super) use staging::{goes_aside, staged};

use crate::comm::{CommError, Communicator, Group, Kind, Monitor, Record, Tag};
use crate::session::{CommChoice, SessionError};
use choose::{Brought, Decision, decide};
use lookout::{Begun, Lookout};
use std::cell::{Cell, Ref, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tpshard_driver::cuda::{Device, Event, Lane, Memory};
use tpshard_driver::nccl::{Clique, ID_BYTES, Nccl};
use tpshard_driver::{DriverError, SearchPath};
use tpshard_ir::Op;
use tpshard_ir::program::RankProgram;

/// How long a wait for the library gives up the core before it sleeps in between.
const LIVELY: Duration = Duration::from_millis(1);
const NAP: Duration = Duration::from_micros(100);

/// How long the library may take to make a clique, as long as all ranks are at work on it.
const MEETING: Duration = Duration::from_secs(180);

/// NCCL takes it over what it is told in a call.
const BLOCKING: &str = "NCCL_COMM_BLOCKING";

/// One rank's ends of the collectives between devices.
pub(super) struct Links {
    rank: usize,
    device: Device,
    monitor: Arc<dyn Monitor>,
    /// By their ranks.
    cliques: BTreeMap<Vec<usize>, Arc<Clique>>,
    lookout: Lookout,
    /// Memory for values on their way, of collectives in the main queue, whose order keeps what one has there from the next.
    staging: RefCell<Memory>,
    /// Marks in the main queue that the side one waits for, each free again once that is said.
    ready: RefCell<Vec<Event>>,
    /// The end of what is in the side queue.
    aside: Event,
    /// Whether products are made in the pieces that the program names, and reduced piece by piece: all ranks do or none.
    pieces: bool,
}

/// Why a collective did not come about.
enum Trouble {
    /// On this rank, of which the others know nothing yet.
    Here(String),
    Failed(CommError),
}

impl From<DriverError> for Trouble {
    fn from(error: DriverError) -> Trouble {
        Trouble::Here(error.to_string())
    }
}

impl From<String> for Trouble {
    fn from(what: String) -> Trouble {
        Trouble::Here(what)
    }
}

impl From<CommError> for Trouble {
    fn from(error: CommError) -> Trouble {
        Trouble::Failed(error)
    }
}

/// What carries the collectives of a program, and how that is told to people.
pub(super) struct Carrier {
    pub(super) links: Option<Links>,
    pub(super) description: String,
}

impl Links {
    /// Decides with all ranks what carries the collectives, and makes it ready. `pieces` says in which pieces this rank can
    /// make products that are reduced.
    ///
    /// # Errors
    /// The same on all ranks: NCCL was asked for and cannot be used, or a failed collective.
    pub(super) fn open(
        program: &RankProgram,
        device: &Device,
        search: &SearchPath,
        (choice, pieces): (CommChoice, &str),
        communicator: &dyn Communicator,
        sequence: &mut u64,
    ) -> Result<Carrier, SessionError> {
        let world = communicator.world_size();
        if world == 1 {
            return Ok(Carrier { links: None, description: String::new() });
        }
        let library = match choice {
            CommChoice::Shm => Err("not asked for".to_owned()),
            CommChoice::Auto | CommChoice::Nccl => told_not_to_wait(std::env::var_os(BLOCKING).as_deref())
                .and_then(|()| Nccl::load(search).map_err(|error| error.to_string())),
        };
        let own = Brought {
            choice,
            version: library.as_ref().map(Nccl::version).map_err(Clone::clone),
            bus: device.bus().to_owned(),
            pieces: pieces.to_owned(),
        };
        let decision = together(&own, communicator, sequence)?;
        match (decision, library) {
            (Decision::Nccl { pieces }, Ok(library)) => {
                let (major, minor, patch) = library.version();
                let rank = communicator.rank();
                let groups = axes_of(program).iter().map(|axes| program.mesh.group(rank, axes)).collect();
                let mut links = Links::join(groups, device, &Arc::new(library), communicator, sequence)?;
                links.pieces = pieces;
                let description = format!(", collectives by NCCL {major}.{minor}.{patch}");
                Ok(Carrier { links: Some(links), description })
            }
            (Decision::Host(why), _) => {
                Ok(Carrier { links: None, description: format!(", collectives through host memory ({why})") })
            }
            (Decision::Refuse(what), _) => Err(SessionError::Device { what }),
            (Decision::Nccl { .. }, Err(what)) => Err(SessionError::Device { what }),
        }
    }

    /// Makes this rank's ends, group by group, which are in an order that all ranks of each agree on.
    fn join(
        groups: Vec<Vec<usize>>,
        device: &Device,
        library: &Arc<Nccl>,
        communicator: &dyn Communicator,
        sequence: &mut u64,
    ) -> Result<Links, SessionError> {
        let monitor = communicator.monitor();
        let rank = communicator.rank();
        let mut cliques: BTreeMap<Vec<usize>, Arc<Clique>> = BTreeMap::new();
        let here = |error: DriverError| given_up(communicator, error.to_string());
        let staging = device.allocate(0).map_err(here)?;
        device.open_side().map_err(here)?;
        let aside = device.event().map_err(here)?;
        for ranks in groups {
            *sequence += 1;
            let tag = Tag { sequence: *sequence, node: u32::MAX };
            if ranks.len() < 2 || cliques.contains_key(&ranks) {
                continue;
            }
            let clique = meet(device, library, &ranks, communicator, tag)?;
            cliques.insert(ranks, Arc::new(clique));
        }
        let all = cliques.values().cloned().collect();
        let lookout = Lookout::start(monitor.clone(), rank, device.clone(), all)
            .map_err(|error| given_up(communicator, error.to_string()))?;
        device.set_watch(Some(lookout.watch()));
        let (staging, ready) = (RefCell::new(staging), RefCell::default());
        let device = device.clone();
        Ok(Links { rank, device, monitor, cliques, lookout, staging, ready, aside, pieces: false })
    }

    /// What ended the collectives, if anything has.
    pub(super) fn failure(&self) -> Option<CommError> {
        self.lookout.failure()
    }

    /// Tells the communicator which collectives are done.
    pub(super) fn note(&self, communicator: &dyn Communicator) {
        for sequence in self.lookout.take_settled() {
            communicator.settled(sequence);
        }
    }

    /// What failed first on this rank, if anything has: what goes wrong with collectives then comes from it.
    pub(super) fn blame(&self, first: Option<String>) {
        self.lookout.blame(first);
    }

    /// Ends the run on all ranks because this one cannot do its part.
    pub(super) fn give_up(&self, communicator: &dyn Communicator, what: String) -> CommError {
        self.note(communicator);
        let known = self.failure().or_else(|| self.monitor.failure(&[]));
        let error = known.unwrap_or_else(|| self.lookout.because(what));
        self.ended(communicator, error)
    }

    fn ended(&self, communicator: &dyn Communicator, error: CommError) -> CommError {
        communicator.abort(&lookout::reason(&error));
        // What is in the queue may never be done, also if it is not looked after yet.
        self.lookout.end(error.clone());
        error
    }

    /// Whether products are made in the pieces that the program names.
    pub(super) fn has_pieces(&self) -> bool {
        self.pieces
    }

    /// Marks the end of the main queue, for piece number `piece` of the collective that follows.
    ///
    /// # Errors
    /// The driver fails.
    pub(super) fn ready(&self, piece: usize) -> Result<(), DriverError> {
        let mut ready = self.ready.borrow_mut();
        while ready.len() <= piece {
            ready.push(self.device.event()?);
        }
        ready.get(piece).map_or(Ok(()), Event::record)
    }

    /// What is put into the side queue from now on waits for what [`Links::ready`] marked.
    fn wait_for(&self, piece: usize) -> Result<(), DriverError> {
        self.ready.borrow().get(piece).map_or(Ok(()), |event| self.device.wait_in(Lane::Side, event))
    }

    /// What is put into the main queue from now on waits for the collectives in the side queue.
    ///
    /// # Errors
    /// The driver fails.
    pub(super) fn join_side(&self) -> Result<(), DriverError> {
        self.aside.record_in(Lane::Side)?;
        self.device.wait_in(Lane::Main, &self.aside)
    }

    /// Counts a collective and puts it into a queue, between the copies before and after it.
    fn carry(
        &self,
        communicator: &dyn Communicator,
        record: Record,
        group: &Group,
        Way { lane, pieces }: Way,
        body: impl FnOnce(&Members<'_>) -> Result<(), Trouble>,
    ) -> Result<(), CommError> {
        self.note(communicator);
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        let (kind, tag) = (record.kind, record.tag);
        communicator.carried(record);
        let clique = self.cliques.get(group.ranks());
        let Some(me) = group.position(self.rank) else {
            let what = format!("rank {} is not in group {:?}", self.rank, group.ranks());
            return Err(self.give_up(communicator, what));
        };
        if clique.is_none() && group.len() > 1 {
            return Err(self.give_up(communicator, format!("no clique of the ranks {:?}", group.ranks())));
        }
        let open = Cell::new(pieces.max(1));
        let members =
            Members { links: self, group, me, clique, kind, tag, lane, begun: Cell::new(None), open };
        let done = members.begin(0).and_then(|()| {
            body(&members)?;
            // If nothing was called, the copies are all there is.
            members.mark()
        });
        done.map_err(|trouble| match trouble {
            Trouble::Here(what) => self.give_up(communicator, what),
            Trouble::Failed(error) => {
                self.note(communicator);
                self.ended(communicator, error)
            }
        })
    }

    /// Makes sure of memory for values on their way.
    ///
    /// # Errors
    /// There is too little memory.
    pub(super) fn make_room(&self, bytes: u64) -> Result<(), DriverError> {
        self.staging(bytes).map(drop)
    }

    /// Memory for values on their way.
    fn staging(&self, bytes: u64) -> Result<Ref<'_, Memory>, DriverError> {
        if self.staging.borrow().len() < bytes {
            let larger = self.device.allocate(bytes)?;
            *self.staging.borrow_mut() = larger;
        }
        Ok(self.staging.borrow())
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        // After a failure, the others do not take part in an end in peace.
        let healthy = self.lookout.stop() && self.monitor.failure(&[]).is_none();
        if healthy {
            self.cliques.values().for_each(|clique| clique.finish());
            self.lookout.dismiss();
            self.device.set_watch(None);
        } else {
            self.lookout.abort();
            // What is not ended by now is not waited for.
            self.lookout.break_off();
        }
    }
}

/// How a collective goes into a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    /// In the side queue, it begins when what was [marked](Links::ready) has passed.
    pub(super) lane: Lane,
    pub(super) pieces: usize,
}

/// The ranks of a collective, seen from one of them.
struct Members<'a> {
    links: &'a Links,
    group: &'a Group,
    /// This rank's position.
    me: usize,
    /// None for a rank alone.
    clique: Option<&'a Arc<Clique>>,
    kind: Kind,
    tag: Tag,
    lane: Lane,
    /// Until its end is marked.
    begun: Cell<Option<Begun>>,
    /// Pieces whose end is not marked.
    open: Cell<usize>,
}

impl Members<'_> {
    /// Begins a piece of the collective, or all of it.
    fn begin(&self, piece: usize) -> Result<(), Trouble> {
        if self.lane == Lane::Side {
            self.links.wait_for(piece)?;
        }
        self.begun.set(Some(self.links.lookout.begin(self.lane)?));
        Ok(())
    }

    /// Marks the end of what has begun, once.
    fn mark(&self) -> Result<(), Trouble> {
        let Some(begun) = self.begun.take() else { return Ok(()) };
        let open = self.open.get().saturating_sub(1);
        self.open.set(open);
        let named = (self.kind, self.tag);
        Ok(self.links.lookout.mark(named, self.group.ranks(), begun, open == 0)?)
    }

    /// Calls the library and waits until the work is in the queue, so that what comes next is behind it.
    fn call(&self, call: impl FnOnce(&Clique, Lane) -> Result<(), DriverError>) -> Result<(), Trouble> {
        let Some(clique) = self.clique else { return Err("a rank alone calls nobody".to_owned().into()) };
        call(clique, self.lane)?;
        let ranks = (self.links.rank, self.group.ranks());
        settle(clique, &*self.links.monitor, ranks, (self.kind, self.tag), Stage::Calling)?;
        // Before anything else is put into the queue, for which the driver may wait.
        self.mark()
    }
}

/// What the library is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// A clique: all its members are at work on it then, however long the library takes.
    Meeting,
    /// A collective.
    Calling,
}

/// Waits until the library has done what was asked of it, or will not do it any more.
fn settle(
    clique: &Clique,
    monitor: &dyn Monitor,
    (rank, ranks): (usize, &[usize]),
    (kind, tag): (Kind, Tag),
    stage: Stage,
) -> Result<(), Unsettled> {
    let start = Instant::now();
    let others = ranks.iter().filter(|&&other| other != rank);
    let awaited: Vec<Vec<usize>> = match stage {
        Stage::Meeting => others.map(|&other| vec![other]).collect(),
        Stage::Calling => vec![ranks.to_vec()],
    };
    let watched = awaited.into_iter().map(|ranks| (lookout::Patience::new(monitor, &ranks), ranks));
    let mut watched: Vec<(lookout::Patience, Vec<usize>)> = watched.collect();
    loop {
        if clique.settled()? {
            return Ok(());
        }
        if let Some(failure) = monitor.failure(ranks) {
            return Err(Unsettled::Failed(failure));
        }
        let mut late = watched.iter_mut().find_map(|(patience, ranks)| {
            patience.is_over(monitor, ranks).then(|| (monitor.stall(), ranks.clone()))
        });
        if stage == Stage::Meeting {
            monitor.progress();
            let limit = monitor.stall().max(MEETING);
            late = late.or_else(|| (start.elapsed() >= limit).then(|| (limit, ranks.to_vec())));
        }
        if let Some((waited, late)) = late {
            let missing = late.iter().map(|&rank| monitor.whereabouts(rank)).collect();
            let seconds = waited.as_secs_f64();
            return Err(Unsettled::Failed(CommError::Stalled { kind, tag, seconds, missing }));
        }
        if start.elapsed() < LIVELY { std::thread::yield_now() } else { std::thread::sleep(NAP) }
    }
}

/// Why the library did not do what was asked of it.
enum Unsettled {
    Library(DriverError),
    Failed(CommError),
}

impl From<DriverError> for Unsettled {
    fn from(error: DriverError) -> Unsettled {
        Unsettled::Library(error)
    }
}

impl From<Unsettled> for Trouble {
    fn from(unsettled: Unsettled) -> Trouble {
        match unsettled {
            Unsettled::Library(error) => error.into(),
            Unsettled::Failed(error) => error.into(),
        }
    }
}

/// Whether the environment leaves it to us how the library is called: if it waits, nobody notices that a rank is gone.
fn told_not_to_wait(blocking: Option<&OsStr>) -> Result<(), String> {
    let value = blocking.map(|value| value.to_string_lossy().trim().to_owned()).unwrap_or_default();
    match value.as_str() {
        "" | "0" => Ok(()),
        _ => Err(format!("{BLOCKING}={value} is set\n  help: unset it")),
    }
}

/// All ranks tell rank 0 what they have, and hear what is to be done.
fn together(
    own: &Brought,
    communicator: &dyn Communicator,
    sequence: &mut u64,
) -> Result<Decision, SessionError> {
    let group = Group::world(communicator.world_size());
    let mut tag = || {
        *sequence += 1;
        Tag { sequence: *sequence, node: u32::MAX }
    };
    let unreadable = |error: serde_json::Error| SessionError::Program { what: format!("links: {error}") };
    let message = serde_json::to_vec(own).map_err(unreadable)?;
    let all = communicator.gather_bytes(&group, tag(), 0, &message)?;
    let decision = match all {
        Some(all) => {
            let all = all.iter().map(|bytes| serde_json::from_slice(bytes)).collect::<Result<Vec<_>, _>>();
            let decision = match all {
                Ok(all) => decide(&all),
                Err(error) => Decision::Refuse(format!("a rank said something else: {error}")),
            };
            serde_json::to_vec(&decision).map_err(unreadable)?
        }
        None => Vec::new(),
    };
    let told = communicator.broadcast_bytes(&group, tag(), 0, &decision)?;
    serde_json::from_slice(&told).map_err(unreadable)
}

/// The sets of mesh axes that collectives between devices go along.
fn axes_of(program: &RankProgram) -> BTreeSet<Vec<usize>> {
    let nodes = program.entries.iter().flat_map(|entry| entry.graph.nodes());
    let axes = nodes.filter_map(|node| match &node.op {
        Op::Convert(conversion) if carries(conversion, node.ty.dtype) => Some(conversion.axes().to_vec()),
        _ => None,
    });
    axes.collect()
}

fn given_up(communicator: &dyn Communicator, what: String) -> CommError {
    communicator.abort(&what);
    CommError::Device { rank: communicator.rank(), what }
}

/// Makes this rank's end of the collectives of `ranks`: the first of them says what they recognise each other by.
fn meet(
    device: &Device,
    library: &Arc<Nccl>,
    ranks: &[usize],
    communicator: &dyn Communicator,
    tag: Tag,
) -> Result<Clique, CommError> {
    let here = |error: DriverError| given_up(communicator, error.to_string());
    let group = Group::new(ranks.to_vec())?;
    let leader = ranks.first().copied().unwrap_or_default();
    let own = if leader == communicator.rank() { Some(library.unique_id().map_err(here)?) } else { None };
    let own: &[u8] = own.as_ref().map_or(&[], |id| id.as_slice());
    let told = communicator.broadcast_bytes(&group, tag, leader, own)?;
    let id: [u8; ID_BYTES] = told
        .try_into()
        .map_err(|_| given_up(communicator, format!("rank {leader} sent something else than an id")))?;
    let me = group.position(communicator.rank()).unwrap_or_default();
    let clique = library.begin(device, &id, me, ranks.len()).map_err(here)?;
    let ranks = (communicator.rank(), ranks);
    match settle(&clique, &*communicator.monitor(), ranks, (Kind::Barrier, tag), Stage::Meeting) {
        Ok(()) => {
            communicator.progress();
            Ok(clique)
        }
        Err(Unsettled::Library(error)) => Err(here(error)),
        Err(Unsettled::Failed(error)) => {
            communicator.abort(&error.to_string());
            Err(error)
        }
    }
}
