//! Starting all ranks on this host and ending them together.
//!
//! The first rank that fails ends the others, so that no rank is left waiting; which one it was, and how, is the
//! result. The kernel kills the ranks if the launcher itself is killed.

use super::RENDEZVOUS_VARIABLE;
use super::child::die_with_parent;
use super::place::launcher_variables;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use signal_hook::SigId;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// After a failure, other ranks may fail in consequence or be the cause, and say in what; what ends within this time is
/// compared. Together with what follows, it must leave all ranks dead within a second.
const COMPARE: Duration = Duration::from_millis(300);
/// What asking nicely gets before SIGKILL.
const GRACE: Duration = Duration::from_millis(500);
/// The exit code for "another rank failed", which is never the cause.
const CONSEQUENCE: i32 = 6;
/// Longest line passed on in one piece.
const LINE_LIMIT: u64 = 64 << 10;
/// Longest last words of a rank that are kept, beyond the first line.
const SAID_LIMIT: usize = 64 << 10;

/// How a job ended if not well.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    #[error("cannot start rank {rank} (`{program}`): {cause}")]
    Start { rank: usize, program: String, cause: io::Error },
    #[error("rank {rank} failed first: {}; the other ranks were ended", describe(*code, *signal))]
    Failed {
        rank: usize,
        code: Option<i32>,
        signal: Option<i32>,
        /// Its last words on standard error, from `error: ` on; those of another rank if it said nothing.
        said: String,
    },
    #[error("interrupted by signal {signal}")]
    Interrupted { signal: i32 },
    #[error("cannot watch over the ranks: {0}")]
    System(#[from] io::Error),
}

fn describe(code: Option<i32>, signal: Option<i32>) -> String {
    match (code, signal) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "unknown end".into(),
    }
}

/// Starts one process per command, as ranks `0 … N - 1` of a job of their own, and waits for all of them.
///
/// Standard error is passed on with the rank before every line; the other streams are the commands' own. SIGINT and
/// SIGTERM are passed on to the ranks while this runs (and stay caught afterwards).
///
/// # Errors
/// [`SpawnError::Failed`] with the rank that failed first.
pub fn spawn_ranks(commands: Vec<Command>) -> Result<(), SpawnError> {
    let signals = Signals::catch()?;
    let mut job = Job::start(commands)?;
    let mut result = job.watch(&signals);
    job.end();
    if let Err(SpawnError::Failed { rank, said, .. }) = &mut result {
        *said = job.said(*rank);
    }
    result
}

struct Running {
    child: Child,
    /// Readable once the process has ended.
    ended: OwnedFd,
    status: Option<ExitStatus>,
    said: Arc<Mutex<String>>,
}

struct Job {
    ranks: Vec<Running>,
    /// Each thread that passes standard error on holds a sender.
    passing: mpsc::Receiver<()>,
}

/// A meeting point that nobody else can guess.
fn fresh_key() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

impl Job {
    fn start(commands: Vec<Command>) -> Result<Job, SpawnError> {
        let (key, world) = (fresh_key()?, commands.len().to_string());
        let (sender, passing) = mpsc::channel();
        let mut job = Job { ranks: vec![], passing };
        for (rank, mut command) in commands.into_iter().enumerate() {
            // Variables given to the command itself stay.
            let kept: Vec<_> = command.get_envs().map(|(name, _)| name.to_owned()).collect();
            for name in launcher_variables().filter(|name| kept.iter().all(|k| k != name)) {
                command.env_remove(name);
            }
            for (name, value) in [("RANK", rank.to_string()), ("LOCAL_RANK", rank.to_string())] {
                command.env(name, value);
            }
            command.env("WORLD_SIZE", &world).env("LOCAL_WORLD_SIZE", &world).env(RENDEZVOUS_VARIABLE, &key);
            command.stderr(Stdio::piped());
            die_with_parent(&mut command);
            let start = |command: &mut Command| -> io::Result<Running> {
                let child = command.spawn()?;
                let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
                Ok(Running { child, ended, status: None, said: Arc::default() })
            };
            match start(&mut command) {
                Ok(mut running) => {
                    if let Some(stderr) = running.child.stderr.take() {
                        let (sender, said) = (sender.clone(), running.said.clone());
                        std::thread::spawn(move || {
                            pass_on(rank, stderr, &said);
                            drop(sender);
                        });
                    }
                    job.ranks.push(running);
                }
                Err(cause) => {
                    job.end();
                    let program = command.get_program().to_string_lossy().into_owned();
                    return Err(SpawnError::Start { rank, program, cause });
                }
            }
        }
        Ok(job)
    }

    /// Returns when all ranks have ended well, or as soon as it is clear which one failed first.
    fn watch(&mut self, signals: &Signals) -> Result<(), SpawnError> {
        let mut failed: Option<(u8, usize, ExitStatus)> = None;
        let mut compare_until = None;
        loop {
            let mut ended = self.reap()?;
            ended.retain(|(_, status)| !status.success());
            for (rank, status) in ended {
                let blame = blame(status);
                if failed.is_none_or(|(other, ..)| blame < other) {
                    failed = Some((blame, rank, status));
                }
                compare_until.get_or_insert_with(|| Instant::now() + COMPARE);
            }
            let alive = self.ranks.iter().any(|r| r.status.is_none());
            let over = compare_until.is_some_and(|until| Instant::now() >= until);
            if let (Some((_, rank, status)), true) = (failed, over || !alive) {
                let (code, signal, said) = (status.code(), status.signal(), String::new());
                return Err(SpawnError::Failed { rank, code, signal, said });
            }
            if !alive {
                return Ok(());
            }
            if let Some(signal) = self.wait(signals, compare_until)? {
                self.signal(if signal == SIGINT { Signal::INT } else { Signal::TERM });
                return Err(SpawnError::Interrupted { signal });
            }
        }
    }

    /// Sleeps until a rank ends, a signal arrives (returned), or the time is over.
    fn wait(&self, signals: &Signals, until: Option<Instant>) -> Result<Option<i32>, SpawnError> {
        let mut fds: Vec<PollFd<'_>> =
            signals.pipes.iter().map(|(_, pipe)| PollFd::new(pipe, PollFlags::IN)).collect();
        let alive = self.ranks.iter().filter(|r| r.status.is_none());
        fds.extend(alive.map(|r| PollFd::new(&r.ended, PollFlags::IN)));
        let timeout = until.map(|until| {
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(SpawnError::System(error.into())),
        }
        let caught = signals.pipes.iter().zip(&fds).find(|(_, fd)| !fd.revents().is_empty());
        Ok(caught.map(|((signal, _), _)| *signal))
    }

    /// Collects the ranks that have ended since the last call.
    fn reap(&mut self) -> io::Result<Vec<(usize, ExitStatus)>> {
        let mut ended = vec![];
        for (rank, running) in self.ranks.iter_mut().enumerate().filter(|(_, r)| r.status.is_none()) {
            if let Some(status) = running.child.try_wait()? {
                running.status = Some(status);
                ended.push((rank, status));
            }
        }
        Ok(ended)
    }

    /// The last words of a rank, or of the first other one that said something.
    fn said(&self, rank: usize) -> String {
        let words = self.ranks.get(rank).into_iter().chain(&self.ranks).map(|running| {
            let said = running.said.lock().unwrap_or_else(|poison| poison.into_inner());
            said.trim_end().to_owned()
        });
        words.into_iter().find(|said| !said.is_empty()).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) {
        // Ranks that are not reaped yet keep their number, so that no other process can be hit.
        for running in self.ranks.iter().filter(|r| r.status.is_none()) {
            let _ = kill_process(Pid::from_child(&running.child), signal);
        }
    }

    /// Ends whatever still runs, within a second, and waits for the last lines.
    fn end(&mut self) {
        self.signal(Signal::TERM);
        let deadline = Instant::now() + GRACE;
        while self.reap().is_ok()
            && self.ranks.iter().any(|r| r.status.is_none())
            && Instant::now() < deadline
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.signal(Signal::KILL);
        for running in self.ranks.iter_mut().filter(|r| r.status.is_none()) {
            running.status = running.child.wait().ok();
        }
        // Disconnects when all threads are done. A grandchild may keep a pipe open; it is not waited for.
        let _ = self.passing.recv_timeout(GRACE);
    }
}

/// How likely an end is the cause of the others; less is likelier.
fn blame(status: ExitStatus) -> u8 {
    match status.code() {
        None => 0,
        Some(CONSEQUENCE) => 2,
        Some(_) => 1,
    }
}

/// Adds a line to a rank's last words, which begin with its last error.
fn remember(said: &Mutex<String>, line: &[u8]) {
    let mut said = said.lock().unwrap_or_else(|poison| poison.into_inner());
    let line = String::from_utf8_lossy(line);
    match line.strip_prefix("error: ") {
        Some(error) => *said = error.into(),
        None if !said.is_empty() && said.len() + line.len() <= SAID_LIMIT => said.push_str(&line),
        None => {}
    }
}

fn pass_on(rank: usize, stderr: ChildStderr, said: &Mutex<String>) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    while let Ok(1..) = reader.by_ref().take(LINE_LIMIT).read_until(b'\n', &mut line) {
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        remember(said, &line);
        let mut whole = format!("[rank {rank}] ").into_bytes();
        whole.append(&mut line);
        // One write per line, so that ranks do not interleave; if nobody reads, nobody misses it.
        let _ = io::stderr().lock().write_all(&whole);
    }
}

/// SIGINT and SIGTERM as something to poll.
struct Signals {
    pipes: Vec<(i32, UnixStream)>,
    handlers: Vec<SigId>,
}

impl Signals {
    fn catch() -> io::Result<Signals> {
        let mut signals = Signals { pipes: vec![], handlers: vec![] };
        for signal in [SIGINT, SIGTERM] {
            let (reader, writer) = UnixStream::pair()?;
            signals.handlers.push(signal_hook::low_level::pipe::register(signal, writer)?);
            signals.pipes.push((signal, reader));
        }
        Ok(signals)
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            signal_hook::low_level::unregister(handler);
        }
    }
}
