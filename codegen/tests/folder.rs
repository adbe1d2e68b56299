//! The output folder on a real file system, and what is left of it when its writer is killed.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use tpshard_codegen::folder::{CONFIG, FolderError, OutputFolder};

const MARKED: &str = r#"{"versions": {"tool": "0"}, "format": "tpshard-folder", "more": [1, 2]}"#;
const FILES: usize = 8;

fn parent() -> (TempDir, PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("out");
    (parent, out)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn start(out: &Path, overwrite: bool) -> Result<OutputFolder, FolderError> {
    OutputFolder::create(out, overwrite, 1000, &[])
}

/// Writes a folder whose files all hold `content`.
fn write(out: &Path, overwrite: bool, content: &str) -> Result<(), FolderError> {
    let folder = start(out, overwrite)?;
    for index in 0..FILES {
        folder.file(&format!("rank{index}.safetensors"))?.write_all_at(content.as_bytes(), 5).unwrap();
    }
    folder.executable("rank0")?.write_all(content.as_bytes()).unwrap();
    folder.file(CONFIG)?.write_all(MARKED.as_bytes()).unwrap();
    folder.commit()
}

/// The content of a complete folder, `None` if there is no folder. A partial one fails the test.
fn content(out: &Path) -> Option<String> {
    if !out.exists() {
        return None;
    }
    assert_eq!(names(out).len(), FILES + 2);
    assert_eq!(fs::read_to_string(out.join(CONFIG)).unwrap(), MARKED);
    let first = fs::read_to_string(out.join("rank0")).unwrap();
    for index in 0..FILES {
        let file = fs::read_to_string(out.join(format!("rank{index}.safetensors"))).unwrap();
        assert_eq!(file, format!("\0\0\0\0\0{first}"));
    }
    Some(first)
}

#[test]
fn a_folder_appears_when_committed_and_not_before() {
    let (parent, out) = parent();
    let folder = start(&out, false).unwrap();
    folder.file(CONFIG).unwrap();
    assert!(!out.exists());
    assert_eq!(names(parent.path()).len(), 2);
    folder.commit().unwrap();
    assert_eq!(names(parent.path()), ["out"]);

    write(&out, true, "new").unwrap_err();
    fs::remove_dir_all(&out).unwrap();
    write(&out, false, "first").unwrap();
    assert_eq!(content(&out).as_deref(), Some("first"));
    let mode = fs::metadata(out.join("rank0")).unwrap().permissions().mode();
    assert_eq!(mode & 0o100, 0o100);
    assert_eq!(fs::metadata(out.join(CONFIG)).unwrap().permissions().mode() & 0o111, 0);
    write(&out, true, "second").unwrap();
    assert_eq!(content(&out).as_deref(), Some("second"));
    assert_eq!(names(parent.path()), ["out"]);
}

#[test]
fn dropping_removes_everything_and_keeps_the_old_folder() {
    let (parent, out) = parent();
    write(&out, false, "old").unwrap();
    let folder = start(&out, true).unwrap();
    folder.file("rank0").unwrap();
    drop(folder);
    let unmarked = start(&out, true).unwrap().commit();
    assert!(matches!(unmarked, Err(FolderError::Unmarked)));
    assert_eq!(names(parent.path()), ["out"]);
    assert_eq!(content(&out).as_deref(), Some("old"));
}

#[test]
fn existing_and_dangerous_targets_are_refused_before_any_work() {
    let (parent, out) = parent();
    for bad in ["/", ".", "..", "", "a/.."] {
        for overwrite in [false, true] {
            assert!(matches!(start(Path::new(bad), overwrite), Err(FolderError::Name { .. })), "{bad}");
        }
    }
    assert!(matches!(start(&parent.path().join("missing/out"), false), Err(FolderError::Io { .. })));

    write(&out, false, "old").unwrap();
    assert!(matches!(start(&out, false), Err(FolderError::Exists { .. })));

    let file = parent.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(matches!(start(&file, true), Err(FolderError::NotAFolder { .. })));
    assert!(matches!(start(&file.join("out"), true), Err(FolderError::NotAFolder { .. })));
    let link = parent.path().join("link");
    symlink(&out, &link).unwrap();
    assert!(matches!(start(&link, true), Err(FolderError::NotAFolder { .. })));

    let photos = parent.path().join("photos");
    fs::create_dir(&photos).unwrap();
    drop(start(&photos, true).unwrap());
    for (name, text) in
        [("holiday.jpg", "x"), (CONFIG, "{}"), (CONFIG, r#"{"format": "gpt2"}"#), (CONFIG, "[")]
    {
        fs::write(photos.join(name), text).unwrap();
        assert!(matches!(start(&photos, true), Err(FolderError::Foreign { .. })), "{name} {text}");
    }

    fs::create_dir(out.join("model")).unwrap();
    for protected in [out.join("model"), out.clone(), link.join("model")] {
        let refused = OutputFolder::create(&out, true, 0, &[&protected]);
        assert!(matches!(refused, Err(FolderError::Holds { .. })), "{}", protected.display());
    }
    drop(OutputFolder::create(&out, true, 0, &[parent.path(), &parent.path().join("out2")]).unwrap());
    let root = Path::new("/usr");
    assert!(matches!(start(root, true), Err(FolderError::Foreign { .. })));

    let full = OutputFolder::create(&parent.path().join("big"), false, u64::MAX, &[]);
    let message = full.unwrap_err().to_string();
    assert!(message.contains("18446744073709551615 bytes are needed"), "{message}");
    assert_eq!(names(parent.path()), ["file", "link", "out", "photos"]);
}

#[test]
fn file_names_stay_in_the_folder() {
    let (_parent, out) = parent();
    let folder = start(&out, false).unwrap();
    for bad in ["", ".", "..", "../x", "a/b", "/etc/x", "a/", "a\0"] {
        assert!(matches!(folder.file(bad), Err(FolderError::FileName { .. })), "{bad:?}");
    }
    folder.file("a").unwrap();
    assert!(matches!(folder.file("a"), Err(FolderError::Io { .. })));
}

#[test]
fn of_two_builds_the_second_to_finish_is_refused() {
    let (parent, out) = parent();
    let (one, two) = (start(&out, false).unwrap(), start(&out, false).unwrap());
    assert!(one.temporary().exists());
    for folder in [&one, &two] {
        folder.file(CONFIG).unwrap().write_all(MARKED.as_bytes()).unwrap();
    }
    two.commit().unwrap();
    assert!(matches!(one.commit(), Err(FolderError::Exists { .. })));
    assert_eq!(names(parent.path()), ["out"]);
}

#[test]
fn a_folder_that_became_foreign_meanwhile_is_not_replaced() {
    let (_parent, out) = parent();
    let folder = start(&out, true).unwrap();
    folder.file(CONFIG).unwrap();
    fs::create_dir(&out).unwrap();
    fs::write(out.join("thesis.txt"), "years of work").unwrap();
    assert!(matches!(folder.commit(), Err(FolderError::Foreign { .. })));
    assert!(out.join("thesis.txt").exists());
}

/// Starts this test binary again as a writer of `out`.
fn writer(mode: &str, out: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helper_writes", "--nocapture", "--test-threads=1"])
        .env("TPSHARD_TEST_MODE", mode)
        .env("TPSHARD_TEST_OUT", out)
        .stdout(Stdio::piped())
        .stdin(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Not a test of its own: what [`writer`] runs.
#[test]
fn helper_writes() {
    let Some(out) = std::env::var_os("TPSHARD_TEST_OUT").map(PathBuf::from) else { return };
    if std::env::var("TPSHARD_TEST_MODE").unwrap() == "hold" {
        let folder = start(&out, false).unwrap();
        folder.file("rank0").unwrap().write_all(b"partial").unwrap();
        println!("\nholding {}", folder.temporary().display());
        let _ = std::io::stdin().read_line(&mut String::new());
        return;
    }
    for round in 0.. {
        println!("\nround {round}");
        write(&out, true, &format!("{round} {}", "x".repeat(100_000))).unwrap();
    }
}

fn wait_for(child: &mut Child, start: &str) {
    let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.starts_with(start)), "the helper ended early");
}

#[test]
fn a_dead_writer_s_folder_is_removed_and_a_living_one_s_is_not() {
    let (parent, out) = parent();
    let mut holder = writer("hold", &out);
    wait_for(&mut holder, "holding");
    let left = names(parent.path());
    assert_eq!(left.len(), 2);

    write(&out, false, "mine").unwrap();
    assert!(left.iter().all(|name| parent.path().join(name).exists()), "{left:?}");
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert!(left.iter().all(|name| parent.path().join(name).exists()));

    // A folder without its lock file has no owner either.
    fs::create_dir(parent.path().join(".out.tpshard-1-0")).unwrap();
    write(&out, true, "next").unwrap();
    assert_eq!(names(parent.path()), ["out"]);
}

#[test]
fn after_a_kill_at_any_moment_the_folder_is_absent_or_complete() {
    let (parent, out) = parent();
    let (mut seed, mut complete) = (7u64, 0);
    for kill in 0..12 {
        let mut child = writer("write", &out);
        // In the first round nothing precedes the kill, later there is a folder to be replaced.
        wait_for(&mut child, &format!("round {}", kill % 3));
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        std::thread::sleep(Duration::from_micros(seed >> 33 & 0x7fff));
        child.kill().unwrap();
        child.wait().unwrap();
        complete += usize::from(content(&out).is_some());
    }
    assert!(complete > 0);
    write(&out, true, "last").unwrap();
    assert_eq!(names(parent.path()), ["out"]);
    assert_eq!(content(&out).as_deref(), Some("last"));
}
