//! N processes on one host, over a file in memory that rank 0 hands out through Unix sockets.
//!
//! The sockets stay open for the whole run: the kernel closes them when a process ends, however it ends, which is how
//! the others learn of it at once. How the sockets came to be is `launch::rendezvous`'s matter.

use super::collectives::Collectives;
use super::shared::{Endpoint, Region};
use super::{CommError, CommOptions, Communicator};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::OwnedFd;
use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

/// What a rank holds after the rendezvous.
pub struct ShmLink {
    pub rank: usize,
    pub world_size: usize,
    /// The shared memory, from [`ShmLink::memory`] on rank 0.
    pub memory: File,
    /// Open connections: on rank 0 to every other rank, elsewhere to rank 0.
    pub peers: Vec<(usize, UnixStream)>,
}

impl ShmLink {
    /// The shared memory for a job, made by rank 0 and passed to the others.
    ///
    /// # Errors
    /// As [`super::threads`].
    pub fn memory(world_size: usize, options: &CommOptions) -> Result<File, CommError> {
        Region::file(world_size, options.slot_bytes)
    }
}

/// The communicator of a process.
///
/// # Errors
/// [`CommError::System`] if the memory cannot be mapped or the watcher cannot start.
pub fn shm(link: ShmLink, options: &CommOptions) -> Result<Box<dyn Communicator>, CommError> {
    let region = Arc::new(Region::of_file(&link.memory, link.world_size, options.slot_bytes)?);
    if link.rank >= link.world_size {
        let what = format!("rank {} in a world of {}", link.rank, link.world_size);
        return Err(CommError::Usage { what });
    }
    let endpoint = Endpoint::new(region.clone(), link.rank, options);
    let watcher = Watcher::start(region, link.peers)?;
    Ok(Box::new(Collectives::new(Watched { endpoint, _watcher: watcher })))
}

/// An endpoint with its watcher. Fields drop in order: the region must know that this rank left before the sockets
/// close, or the others would take it for dead.
struct Watched {
    endpoint: Endpoint,
    _watcher: Watcher,
}

impl super::transport::Transport for Watched {
    fn rank(&self) -> usize {
        self.endpoint.rank()
    }
    fn world_size(&self) -> usize {
        self.endpoint.world_size()
    }
    fn slot_bytes(&self) -> usize {
        self.endpoint.slot_bytes()
    }
    fn post(
        &self,
        step: &super::transport::Step,
        readers: &[usize],
        len: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), CommError> {
        self.endpoint.post(step, readers, len, fill)
    }
    fn take(
        &self,
        step: &super::transport::Step,
        sources: &[super::transport::Source],
        read: &mut dyn FnMut(&[&[u8]]),
    ) -> Result<(), CommError> {
        self.endpoint.take(step, sources, read)
    }
    fn enter(&self, kind: super::Kind, tag: super::Tag) {
        self.endpoint.enter(kind, tag);
    }
    fn progress(&self) {
        self.endpoint.progress();
    }
    fn abort(&self, reason: &str) {
        self.endpoint.abort(reason);
    }
    fn monitor(&self) -> Arc<dyn super::Monitor> {
        self.endpoint.monitor()
    }
}

/// A thread that sleeps until a peer's socket closes.
struct Watcher {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    fn start(region: Arc<Region>, peers: Vec<(usize, UnixStream)>) -> Result<Watcher, CommError> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| CommError::system("eventfd", e))?;
        let stop = Arc::new(stop);
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("tpshard-watch".into())
            .spawn(move || watch(&region, peers, &stopped))
            .map_err(|e| CommError::system("the thread that watches the other ranks", e))?;
        Ok(Watcher { stop, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // An eventfd takes eight bytes at any time; the thread ends at the next poll.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(region: &Region, mut peers: Vec<(usize, UnixStream)>, stop: &OwnedFd) {
    use super::shared::Presence;
    loop {
        let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
        fds.extend(peers.iter().map(|(_, stream)| PollFd::new(stream, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
        let events: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if events.first() == Some(&true) {
            return;
        }
        let mut events = events.into_iter().skip(1);
        peers.retain_mut(|(rank, stream)| {
            // Nothing is sent after the rendezvous, so that whatever can be read is the end.
            if !events.next().unwrap_or(false) || matches!(stream.read(&mut [0; 64]), Ok(n) if n > 0) {
                return true;
            }
            if region.presence(*rank) == Presence::Here {
                region.bury(*rank);
            }
            false
        });
    }
}
