//! Commands that may take long, or never end.

use std::fs::File;
use std::io::{Read, Seek};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Runs a command; what it prints, or the line of what it says that tells most of a failure.
pub(super) fn said(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    told(output.status, &output.stdout, &output.stderr)
}

/// As [`said`], of a command that is ended after `patience`.
pub(super) fn said_within(command: &mut Command, patience: Duration) -> Result<String, String> {
    let started = started(command)?;
    ended(vec![started], patience).pop().unwrap_or_else(|| Err("it was not started".into()))
}

/// A command that runs. What it says goes to files without names: a pipe would stay open for as long as any process that
/// it started.
pub(super) struct Started {
    child: Child,
    stdout: File,
    stderr: File,
}

pub(super) fn started(command: &mut Command) -> Result<Started, String> {
    let [stdout, stderr] = [nameless()?, nameless()?];
    let handle = |file: &File| file.try_clone().map(Stdio::from).map_err(|error| error.to_string());
    command.stdin(Stdio::null()).stdout(handle(&stdout)?).stderr(handle(&stderr)?);
    let child = command.spawn().map_err(|error| error.to_string())?;
    Ok(Started { child, stdout, stderr })
}

fn nameless() -> Result<File, String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("tpshard-xtask-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    let open = || {
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(file)
    };
    open().map_err(|error: std::io::Error| format!("{}: {error}", path.display()))
}

/// Waits for all, and ends those that are left when the time is up.
pub(super) fn ended(all: Vec<Started>, patience: Duration) -> Vec<Result<String, String>> {
    let end = Instant::now() + patience;
    let wait = |mut started: Started| {
        let status = status(&mut started.child, end)
            .ok_or_else(|| format!("it was ended after {} s", patience.as_secs()))?;
        told(status, &read(started.stdout), &read(started.stderr))
    };
    all.into_iter().map(wait).collect()
}

/// How a process ended by itself.
fn status(child: &mut Child, end: Instant) -> Option<ExitStatus> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
            Ok(None) | Err(_) => {
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
    }
}

fn read(mut file: File) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
    bytes
}

fn told(status: ExitStatus, stdout: &[u8], stderr: &[u8]) -> Result<String, String> {
    let text = String::from_utf8_lossy(stdout).into_owned();
    if status.success() {
        return Ok(text);
    }
    let text = text + &String::from_utf8_lossy(stderr);
    let telling = text.lines().rev().find(|line| line.contains("FAILED") || line.contains("rror"));
    let last = || text.lines().rev().find(|line| !line.trim().is_empty());
    Err(telling.or_else(last).unwrap_or("no message").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn what_never_ends_is_ended_and_what_fails_says_why() {
        let long = Duration::from_secs(60);
        assert_eq!(said_within(&mut shell("echo fine"), long), Ok("fine\n".into()));
        let failed = said_within(&mut shell("echo 'error: no GPU' >&2; echo more; exit 3"), long);
        assert_eq!(failed, Err("error: no GPU".into()));
        let hung = said_within(&mut shell("exec sleep 600"), Duration::from_millis(100)).unwrap_err();
        assert!(hung.contains("was ended"), "{hung}");
    }
}
