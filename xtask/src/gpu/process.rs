//! Commands that may take long, or never end.

use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Runs a command; what it prints, or the line of what it says that tells most of a failure.
pub(super) fn said(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    told(&output)
}

/// As [`said`], of a command that is ended after `patience`.
pub(super) fn said_within(command: &mut Command, patience: Duration) -> Result<String, String> {
    let child = started(command)?;
    ended(vec![child], patience).pop().unwrap_or_else(|| Err("it was not started".into()))
}

pub(super) fn started(command: &mut Command) -> Result<Child, String> {
    let piped = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    piped.spawn().map_err(|error| error.to_string())
}

/// Waits for all, and ends those that are left when the time is up.
pub(super) fn ended(children: Vec<Child>, patience: Duration) -> Vec<Result<String, String>> {
    let end = Instant::now() + patience;
    let wait = |mut child: Child| {
        let process = child.id();
        // Its output is read on the way, so that it never waits for a full pipe.
        let reader = std::thread::spawn(move || {
            let late = std::thread::scope(|scope| {
                let stdout = child.stdout.take();
                let stderr = child.stderr.take();
                let out = scope.spawn(move || read(stdout));
                let err = scope.spawn(move || read(stderr));
                let status = loop {
                    match child.try_wait() {
                        Ok(Some(status)) => break Ok(status),
                        Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
                        Ok(None) => {
                            let _ = child.kill();
                            let _ = child.wait();
                            break Err(format!("process {process} was ended after {} s", patience.as_secs()));
                        }
                        Err(error) => break Err(error.to_string()),
                    }
                };
                let (stdout, stderr) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
                status.map(|status| Output { status, stdout, stderr })
            });
            late.and_then(|output| told(&output))
        });
        reader
    };
    let readers: Vec<_> = children.into_iter().map(wait).collect();
    readers
        .into_iter()
        .map(|reader| reader.join().unwrap_or_else(|_| Err("it cannot be read".into())))
        .collect()
}

fn read(stream: Option<impl std::io::Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        let _ = stream.read_to_end(&mut bytes);
    }
    bytes
}

fn told(output: &Output) -> Result<String, String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let text = text + &String::from_utf8_lossy(&output.stderr);
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
