//! Programs in real executables: this test binary itself, plain and after the tools people run on executables.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tpshard_codegen::elf::{ElfError, PAGE, SECTION, program, with_program};
use tpshard_ir::container;
use tpshard_runtime::elf::{ElfError as ReadError, find_section, read_section};

fn own() -> Vec<u8> {
    fs::read(std::env::current_exe().unwrap()).unwrap()
}

fn payload() -> Vec<u8> {
    let cubin: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
    container::encode(&[("program", b"entry decode"), ("sm_90.cubin", &cubin)]).unwrap()
}

fn write_executable(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Whether the test binary at `path` still runs; `--list` is answered by the test harness.
fn runs(path: &Path) -> bool {
    let output = Command::new(path).arg("--list").output().unwrap();
    output.status.success() && String::from_utf8_lossy(&output.stdout).contains("tools_keep_the_program")
}

#[test]
fn reader_finds_what_the_writer_wrote() {
    let (runner, payload) = (own(), payload());
    assert_eq!(program(&runner), Ok(None));
    let packed = with_program(&runner, &payload).unwrap();
    assert_eq!(program(&packed), Ok(Some(&payload[..])));
    let range = find_section(&packed).unwrap().unwrap();
    assert_eq!(range.start % PAGE, 0);
    assert_eq!(packed[range], payload[..]);
    assert!(container::decode(&payload).is_ok());

    let folder = tempfile::tempdir().unwrap();
    let path = write_executable(folder.path(), "rank 0", &packed);
    assert_eq!(read_section(&path).unwrap().unwrap(), payload);
    assert!(runs(&path));
}

#[test]
fn packing_is_reproducible_and_replacing_equals_packing_afresh() {
    let (runner, payload) = (own(), payload());
    let packed = with_program(&runner, &payload).unwrap();
    assert_eq!(packed, with_program(&runner, &payload).unwrap());
    for other in [&b"shorter"[..], b"", &vec![5; 300_000]] {
        let replaced = with_program(&packed, other).unwrap();
        assert_eq!(program(&replaced), Ok(Some(other)));
        assert!(replaced == with_program(&runner, other).unwrap());
        assert!(with_program(&replaced, &payload).unwrap() == packed);
    }
}

#[test]
fn bytes_behind_the_runner_are_kept() {
    let mut runner = own();
    runner.extend_from_slice(b"a note that belongs to no section");
    let length = runner.len();
    let packed = with_program(&runner, b"one").unwrap();
    assert_eq!(packed[HEADER..length], runner[HEADER..]);
    let replaced = with_program(&packed, b"two").unwrap();
    assert_eq!(replaced[HEADER..length], runner[HEADER..]);
    assert_eq!(program(&replaced), Ok(Some(&b"two"[..])));
}

const HEADER: usize = 64;

/// Runs a tool from PATH, or says aloud that it is missing.
fn tool(name: &str, arguments: &[&str], file: &Path) -> bool {
    match Command::new(name).args(arguments).arg(file).output() {
        Ok(output) => {
            let complaint = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name} {arguments:?}: {complaint}");
            assert!(complaint.is_empty(), "{name} {arguments:?}: {complaint}");
            true
        }
        Err(error) => {
            assert!(std::env::var_os("TPSHARD_REQUIRE").is_none(), "{name}: {error}");
            eprintln!("skipped: {name} is not on PATH");
            false
        }
    }
}

#[test]
fn tools_keep_the_program() {
    let folder = tempfile::tempdir().unwrap();
    let (runner, payload) = (own(), payload());
    let ways: [(&str, &[&str]); 6] = [
        ("strip", &[]),
        ("strip", &["-s"]),
        ("strip", &["-g"]),
        ("strip", &["--strip-unneeded"]),
        ("objcopy", &[]),
        ("objcopy", &["--compress-debug-sections"]),
    ];
    for (index, (name, arguments)) in ways.into_iter().enumerate() {
        let before = write_executable(folder.path(), &format!("before{index}"), &runner);
        let after = write_executable(
            folder.path(),
            &format!("after{index}"),
            &with_program(&runner, &payload).unwrap(),
        );
        if !tool(name, arguments, &after) || !tool(name, arguments, &before) {
            continue;
        }
        let treated = fs::read(&after).unwrap();
        assert_eq!(program(&treated), Ok(Some(&payload[..])), "{name} {arguments:?}");
        assert_eq!(read_section(&after).unwrap().unwrap(), payload);
        assert!(runs(&after), "{name} {arguments:?}");

        // A treated file takes another program, and a treated runner takes its first.
        let replaced = with_program(&treated, b"next").unwrap();
        assert_eq!(program(&replaced), Ok(Some(&b"next"[..])));
        assert!(runs(&write_executable(folder.path(), &format!("replaced{index}"), &replaced)));
        let packed = with_program(&fs::read(&before).unwrap(), &payload).unwrap();
        assert_eq!(program(&packed), Ok(Some(&payload[..])));
        let path = write_executable(folder.path(), &format!("packed{index}"), &packed);
        assert!(runs(&path));
        assert!(tool("strip", &["-s"], &path));
        assert_eq!(read_section(&path).unwrap().unwrap(), payload);
    }
}

#[test]
fn tools_agree_about_the_tables() {
    let folder = tempfile::tempdir().unwrap();
    let packed = with_program(&own(), &payload()).unwrap();
    let path = write_executable(folder.path(), "rank0", &packed);
    match Command::new("readelf").args(["-W", "-S", "-l"]).arg(&path).output() {
        Ok(output) => {
            let (text, complaint) =
                (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(text.contains(SECTION) && complaint.is_empty(), "{text}{complaint}");
        }
        Err(_) => eprintln!("skipped: readelf is not on PATH"),
    }
    let extracted = folder.path().join("section");
    let extract = format!("--dump-section={SECTION}={}", extracted.display());
    if tool("objcopy", &[&extract], &path) {
        assert_eq!(fs::read(extracted).unwrap(), payload());
    }
}

#[test]
fn other_files_are_refused() {
    let refused = |bytes: &[u8]| with_program(bytes, b"x").unwrap_err().to_string();
    assert!(refused(b"").contains("not an ELF"));
    assert!(refused(b"#!/bin/sh\nexec true").contains("not an ELF"));
    let runner = own();
    let changed = |at: usize, field: &[u8]| {
        let mut bytes = runner.clone();
        bytes[at..at + field.len()].copy_from_slice(field);
        with_program(&bytes, b"x").unwrap_err()
    };
    assert!(changed(4, &[1]).to_string().contains("not 64-bit"));
    assert!(changed(5, &[2]).to_string().contains("big-endian"));
    assert!(changed(18, &[8, 0]).to_string().contains("another processor"));
    assert_eq!(changed(40, &[0; 8]), ElfError::NoSections);
    assert_eq!(changed(60, &[0; 2]), ElfError::NoSections);
    assert!(matches!(changed(60, &[0xff, 0xff]), ElfError::TooManySections { .. }));
    assert!(matches!(changed(62, &[0xff, 0xff]), ElfError::Corrupt { .. }));
    assert!(matches!(changed(40, &[0xff; 8]), ElfError::Corrupt { .. }));
    assert!(matches!(changed(32, &[0xff; 8]), ElfError::Corrupt { .. }));
}

#[test]
fn runners_for_other_machines_can_be_packed_here() {
    for machine in [62u16, 183] {
        let mut runner = own();
        runner[18..20].copy_from_slice(&machine.to_le_bytes());
        let packed = with_program(&runner, b"x").unwrap();
        assert_eq!(packed[find_section(&packed).unwrap().unwrap()], *b"x");
    }
}

/// Flips bits in the headers: an error or a program, never a panic, and never a program that is not in the file.
#[test]
fn damaged_headers_never_panic() {
    let packed = with_program(&own(), &payload()).unwrap();
    let table = u64::from_le_bytes(packed[40..48].try_into().unwrap()) as usize;
    let mut seed = 1u64;
    for _ in 0..100 {
        let mut bytes = packed.clone();
        for _ in 0..3 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let pick = (seed >> 33) as usize;
            let length = packed.len() - table;
            let at = if pick.is_multiple_of(2) { pick / 2 % HEADER } else { table + pick / 2 % length };
            bytes[at] ^= 1 << (seed >> 29 & 7);
        }
        let (write, read) = (program(&bytes), find_section(&bytes));
        if let (Ok(Some(found)), Ok(Some(range))) = (&write, &read) {
            assert_eq!(*found, &bytes[range.clone()]);
        }
        let _ = with_program(&bytes, b"x");
        let cut = seed as usize % packed.len();
        let _ = (with_program(&packed[..cut], b"x"), find_section(&packed[..cut]));
    }
    let cut = find_section(&packed[..packed.len() - 1]);
    assert!(matches!(cut, Err(ReadError::Corrupt { .. })));
}

#[test]
fn a_program_started_through_the_loader_is_found() {
    let loader = ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"];
    let Some(loader) = loader.into_iter().find(|path| Path::new(path).exists()) else {
        return eprintln!("skipped: no dynamic loader at its usual place");
    };
    let folder = tempfile::tempdir().unwrap();
    let path = write_executable(folder.path(), "rank0", &with_program(&own(), &payload()).unwrap());
    for mut command in [Command::new(&path), Command::new(loader)] {
        if command.get_program() == loader {
            command.arg("--inhibit-cache").arg(&path);
        }
        let output = command
            .args(["--exact", "prints_its_own_program", "--nocapture"])
            .env("TPSHARD_TEST_PRINT", "1")
            .output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        assert!(text.contains(&format!("found {} bytes", payload().len())), "{text}");
    }
}

#[test]
fn prints_its_own_program() {
    if std::env::var_os("TPSHARD_TEST_PRINT").is_some() {
        let found = tpshard_runtime::elf::own_section(None).unwrap().unwrap();
        println!("found {} bytes", found.len());
    }
}
