//! Bringing the ranks of one host together.
//!
//! Rank 0 listens on an abstract Unix socket named after the job, which no file outlives; the others connect and say
//! who they are and what they are about to run. When all are there and agree, rank 0 passes the shared memory around.
//! If not, every rank gets the same refusal. Only processes of the same user are listened to.

use super::TIMEOUT_VARIABLE;
use super::agreement::{Agreement, Difference, Signed, differences};
use super::place::{JobKey, LaunchError, Place, Source, job_key};
use crate::comm::{CommOptions, Communicator, ShmLink, shm, solo};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{ToSocketAddrs, UdpSocket};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

const PROTOCOL: &str = "tpshard rendezvous 1";
/// Longest message; an agreement takes a few hundred bytes.
const MESSAGE_LIMIT: usize = 64 << 10;
/// A process that connects and then says nothing must not keep the others waiting.
const HELLO_PATIENCE: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(10);

/// Where and as whom to meet the other ranks.
#[derive(Clone, Debug)]
pub struct Rendezvous {
    pub rank: usize,
    pub world_size: usize,
    pub key: JobKey,
    pub timeout: Duration,
    pub options: CommOptions,
}

/// Why the ranks did not come together; the same on all of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Refusal {
    #[error("refused: process {pid} does not belong to this job (wrong token)")]
    Token { pid: i32 },
    #[error("refused: process {pid} says it is rank {rank} of {world_size}, which this job does not have")]
    Rank { pid: i32, rank: usize, world_size: usize },
    #[error(
        "refused: rank {rank} is there already (process {first}), and process {pid} says it is the same\n  help: a process of an earlier job may still be running"
    )]
    Duplicate { rank: usize, first: i32, pid: i32 },
    #[error("the ranks do not agree: {}\n  help: all ranks must start from the same folder with the same flags", list(.0))]
    Disagreement(Vec<Difference>),
    #[error(
        "after {seconds} s, these ranks are missing: {missing:?}{}\n  help: all ranks must run on one host, in one network namespace; TPSHARD_TIMEOUT=SECONDS waits longer",
        notes(turned_away)
    )]
    Missing { missing: Vec<usize>, seconds: u64, turned_away: Vec<String> },
}

fn list(differences: &[Difference]) -> String {
    differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn notes(turned_away: &[String]) -> String {
    turned_away.iter().map(|note| format!("; {}", note.lines().next().unwrap_or_default())).collect()
}

#[derive(Serialize, Deserialize)]
struct Hello {
    protocol: String,
    token: String,
    rank: usize,
    world_size: usize,
    agreement: Agreement,
}

#[derive(Serialize, Deserialize)]
enum Reply {
    Go { slot_bytes: usize },
    No(Refusal),
}

/// Meets the other ranks. All of them return a communicator, or all of them an error.
///
/// # Errors
/// [`LaunchError::Refused`] with the same reason on all ranks that could be reached; [`LaunchError::Rendezvous`] if
/// the system stands in the way or rank 0 does not appear.
pub fn connect(meeting: &Rendezvous, agreement: &Agreement) -> Result<Box<dyn Communicator>, LaunchError> {
    if meeting.world_size == 1 && meeting.rank == 0 {
        return Ok(solo());
    }
    let deadline = Instant::now() + meeting.timeout;
    if meeting.rank == 0 { host(meeting, agreement, deadline) } else { join(meeting, agreement, deadline) }
}

impl Rendezvous {
    /// The meeting of the job that gave this process its place. `TPSHARD_TIMEOUT` sets the patience, here and in
    /// collectives.
    ///
    /// # Errors
    /// [`LaunchError::SeveralHosts`] if MASTER_ADDR is elsewhere and nothing says that all ranks are here;
    /// [`LaunchError::NoJobKey`]; [`LaunchError::NotANumber`].
    pub fn of_place(
        place: &Place,
        env: &BTreeMap<String, String>,
        mut options: CommOptions,
    ) -> Result<Rendezvous, LaunchError> {
        if let Some(timeout) = env.get(TIMEOUT_VARIABLE) {
            let seconds = timeout.trim().parse().ok().filter(|s: &f64| *s > 0.0 && *s < 1e6);
            let found = || LaunchError::NotANumber { found: format!("{TIMEOUT_VARIABLE}={timeout}") };
            options.stall = Duration::from_secs_f64(seconds.ok_or_else(found)?);
        }
        // An address that is elsewhere, or unknown, is no matter if all ranks are known to be here.
        if place.local_world_size != Some(place.world_size)
            && place.source == Source::Torchrun
            && let Some(address) = env.get("MASTER_ADDR").filter(|address| !is_this_host(address))
        {
            let found = format!("MASTER_ADDR={address} is not this host");
            return Err(LaunchError::SeveralHosts { found });
        }
        let parent = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get().unsigned_abs());
        let key = job_key(place.source, env, rustix::process::geteuid().as_raw(), parent)?;
        let (rank, world_size) = (place.rank, place.world_size);
        Ok(Rendezvous { rank, world_size, key, timeout: options.stall, options })
    }

    fn error(&self, what: impl Into<String>) -> LaunchError {
        LaunchError::Rendezvous { rank: self.rank, world_size: self.world_size, what: what.into() }
    }

    fn address(&self) -> Result<SocketAddr, LaunchError> {
        SocketAddr::from_abstract_name(&self.key.name).map_err(|e| self.error(format!("socket name: {e}")))
    }
}

fn send_message(stream: &mut UnixStream, message: &impl Serialize) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    stream.write_all(&(body.len() as u32).to_le_bytes())?;
    stream.write_all(&body)
}

fn receive_message<M: for<'de> Deserialize<'de>>(stream: &mut UnixStream) -> io::Result<M> {
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > MESSAGE_LIMIT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "message too long"));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}

fn remaining(deadline: Instant) -> Duration {
    // A timeout of zero would mean none at all.
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

struct Guest {
    rank: usize,
    pid: i32,
    stream: UnixStream,
}

fn host(
    meeting: &Rendezvous,
    agreement: &Agreement,
    deadline: Instant,
) -> Result<Box<dyn Communicator>, LaunchError> {
    let listener = UnixListener::bind_addr(&meeting.address()?).map_err(|e| {
        let hint = "another rank 0 of this job, or of an earlier one, is still running";
        let busy = e.kind() == io::ErrorKind::AddrInUse;
        meeting.error(if busy { format!("{hint} ({e})") } else { format!("cannot listen: {e}") })
    })?;
    listener.set_nonblocking(true).map_err(|e| meeting.error(e.to_string()))?;
    let mut all: Vec<Option<Signed>> = vec![None; meeting.world_size];
    all[0] = Some(Signed { world_size: meeting.world_size, agreement: agreement.clone() });
    let (mut guests, mut turned_away) = (Vec::new(), Vec::new());
    while all.iter().any(Option::is_none) {
        let Some(stream) = accept(&listener, deadline).map_err(|e| meeting.error(format!("accept: {e}")))?
        else {
            let missing = (0..meeting.world_size).filter(|&r| all[r].is_none()).collect();
            let refusal = Refusal::Missing { missing, seconds: meeting.timeout.as_secs(), turned_away };
            return Err(dismiss(guests, refusal));
        };
        match admit(meeting, stream, &guests, deadline) {
            Ok(Some((guest, signed))) => {
                all[guest.rank] = Some(signed);
                guests.push(guest);
            }
            Ok(None) => {}
            Err(refusal) => turned_away.push(refusal.to_string()),
        }
    }
    let all: Vec<Signed> = all.into_iter().flatten().collect();
    let differences = differences(&all);
    if !differences.is_empty() {
        return Err(dismiss(guests, Refusal::Disagreement(differences)));
    }
    let memory = ShmLink::memory(meeting.world_size, &meeting.options)?;
    let go = Reply::Go { slot_bytes: meeting.options.slot_bytes };
    for guest in &mut guests {
        let sent = send_message(&mut guest.stream, &go).and_then(|()| send_file(&guest.stream, &memory));
        sent.map_err(|e| meeting.error(format!("rank {} ended during the rendezvous ({e})", guest.rank)))?;
    }
    let peers = guests.into_iter().map(|guest| (guest.rank, guest.stream)).collect();
    link(meeting, memory, peers, &meeting.options)
}

/// The next connection of the same user, `None` when the time is over.
fn accept(listener: &UnixListener, deadline: Instant) -> io::Result<Option<UnixStream>> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        match listener.accept() {
            Ok((stream, _)) if same_user(&stream).is_ok_and(|pid| pid.is_some()) => {
                stream.set_nonblocking(false)?;
                return Ok(Some(stream));
            }
            Ok(_) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The process at the other end, if it belongs to our user.
fn same_user(stream: &UnixStream) -> io::Result<Option<i32>> {
    let peer = rustix::net::sockopt::socket_peercred(stream)?;
    let ours = rustix::process::geteuid();
    Ok((peer.uid == ours).then(|| rustix::process::Pid::as_raw(Some(peer.pid))))
}

/// Hears a connection out. `Ok(None)`: it said nothing sensible and was dropped.
fn admit(
    meeting: &Rendezvous,
    mut stream: UnixStream,
    guests: &[Guest],
    deadline: Instant,
) -> Result<Option<(Guest, Signed)>, Refusal> {
    let patience = remaining(deadline).min(HELLO_PATIENCE);
    if stream.set_read_timeout(Some(patience)).is_err() || stream.set_write_timeout(Some(patience)).is_err() {
        return Ok(None);
    }
    let Ok(Some(pid)) = same_user(&stream) else { return Ok(None) };
    let Ok(hello) = receive_message::<Hello>(&mut stream) else { return Ok(None) };
    let (rank, world_size) = (hello.rank, hello.world_size);
    let refusal = if hello.protocol != PROTOCOL || hello.token != meeting.key.token {
        Some(Refusal::Token { pid })
    } else if rank >= meeting.world_size || rank == 0 {
        Some(Refusal::Rank { pid, rank, world_size })
    } else {
        let first = guests.iter().find(|guest| guest.rank == rank);
        first.map(|guest| Refusal::Duplicate { rank, first: guest.pid, pid })
    };
    match refusal {
        None => Ok(Some((Guest { rank, pid, stream }, Signed { world_size, agreement: hello.agreement }))),
        Some(refusal) => {
            // It may be gone already, and then needs no answer.
            let _ = send_message(&mut stream, &Reply::No(refusal.clone()));
            Err(refusal)
        }
    }
}

/// Sends everybody home with the same reason.
fn dismiss(guests: Vec<Guest>, refusal: Refusal) -> LaunchError {
    for mut guest in guests {
        let _ = send_message(&mut guest.stream, &Reply::No(refusal.clone()));
    }
    refusal.into()
}

fn join(
    meeting: &Rendezvous,
    agreement: &Agreement,
    deadline: Instant,
) -> Result<Box<dyn Communicator>, LaunchError> {
    let mut stream = reach(meeting, deadline)?;
    let lost = |e: io::Error| meeting.error(format!("rank 0 ended during the rendezvous ({e})"));
    if same_user(&stream).map_err(lost)?.is_none() {
        return Err(meeting.error("the job's socket belongs to another user"));
    }
    // Rank 0 tells who is missing when its time is over, which may be later than ours.
    stream.set_read_timeout(Some(meeting.timeout + HELLO_PATIENCE)).map_err(lost)?;
    let hello = Hello {
        protocol: PROTOCOL.into(),
        token: meeting.key.token.clone(),
        rank: meeting.rank,
        world_size: meeting.world_size,
        agreement: agreement.clone(),
    };
    send_message(&mut stream, &hello).map_err(lost)?;
    match receive_message(&mut stream).map_err(lost)? {
        Reply::No(refusal) => Err(refusal.into()),
        Reply::Go { slot_bytes } => {
            let memory = receive_file(&stream).map_err(lost)?;
            let options = CommOptions { slot_bytes, ..meeting.options.clone() };
            link(meeting, memory, vec![(0, stream)], &options)
        }
    }
}

fn reach(meeting: &Rendezvous, deadline: Instant) -> Result<UnixStream, LaunchError> {
    let address = meeting.address()?;
    loop {
        match UnixStream::connect_addr(&address) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= deadline => {
                let seconds = meeting.timeout.as_secs();
                return Err(meeting.error(format!("rank 0 did not appear within {seconds} s ({error})")));
            }
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}

fn link(
    meeting: &Rendezvous,
    memory: File,
    peers: Vec<(usize, UnixStream)>,
    options: &CommOptions,
) -> Result<Box<dyn Communicator>, LaunchError> {
    for (_, stream) in &peers {
        stream.set_read_timeout(None).map_err(|e| meeting.error(e.to_string()))?;
    }
    let link = ShmLink { rank: meeting.rank, world_size: meeting.world_size, memory, peers };
    Ok(shm(link, options)?)
}

fn send_file(stream: &UnixStream, file: &File) -> io::Result<()> {
    let fds = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for a file descriptor"));
    }
    rustix::net::sendmsg(stream, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive_file(stream: &UnixStream) -> io::Result<File> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let file = files.flatten().next();
    file.map(File::from).ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "no shared memory came"))
}

/// True if `address` (as in MASTER_ADDR) is a name or number of this host: a socket can be bound to it.
pub fn is_this_host(address: &str) -> bool {
    let resolved = (address, 0).to_socket_addrs();
    resolved.is_ok_and(|mut addresses| addresses.any(|address| UdpSocket::bind(address).is_ok()))
}
