//! `report.html`: the plan as a page. What it looks like in a browser is checked by `cargo xtask test-all`.

use crate::support::*;
use crate::words;
use serde_json::Value;
use std::fs;
use std::path::Path;

const FLAGS: [&str; 4] = ["--memory", "min", "--dim", "batch=1,seq=1,past=128"];

fn page(folder: &Path) -> String {
    fs::read_to_string(folder.join("report.html")).unwrap()
}

/// What a page says: every element's text on a line of its own, without styles and scripts. How far the search got
/// is left out; the plan does not depend on it.
fn text_of(page: &str) -> String {
    let body = page.split_once("</style>").unwrap().1.split_once("<script>").unwrap().0;
    let mut text = String::new();
    for piece in body.split('<').skip(1) {
        let (tag, said) = piece.split_once('>').unwrap();
        let inline = ["b", "bdi", "small", "strong", "em", "span", "code"];
        if !inline.contains(&tag.trim_start_matches('/').split(' ').next().unwrap()) && !text.ends_with('\n')
        {
            text.push('\n');
        }
        text.push_str(said.trim_matches('\n'));
    }
    let shown =
        |line: &str| if line.starts_with("≤ ") { "≤ * %".to_owned() } else { line.trim().to_owned() };
    text.lines().map(shown).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n") + "\n"
}

/// `TPSHARD_BLESS=1` writes the text instead of comparing with it.
#[test]
fn the_page_says_what_is_committed() {
    let scratch = scratch();
    let folder = scratch.path().join("out");
    shard(4, &folder, &FLAGS);
    let found = text_of(&page(&folder));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/e2e/golden/tiny-llama-tp4-report.txt");
    if std::env::var_os("TPSHARD_BLESS").is_some() {
        fs::write(&path, &found).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap();
    assert!(found == expected, "TPSHARD_BLESS=1 accepts this page:\n{found}");
}

#[test]
fn equal_builds_write_equal_pages() {
    let scratch = scratch();
    let (a, b) = (scratch.path().join("a"), scratch.path().join("b"));
    shard(3, &a, &FLAGS);
    shard(3, &b, &FLAGS);
    assert_eq!(page(&a), page(&b));
}

#[test]
fn the_page_agrees_with_the_plan() {
    let folder = sharded(3);
    let (page, plan) = (page(&folder), fs::read_to_string(folder.join("plan.txt")).unwrap());
    let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    let plan_json = &config["build"]["plan"];
    let counts = plan_json["collective_counts"].as_object().unwrap();
    assert!(!counts.is_empty());
    for kind in counts.keys() {
        assert!(page.contains(&format!("⇄ {kind}</span></th>")), "{kind}");
    }
    let count: u64 = counts.values().map(|c| c.as_u64().unwrap()).sum();
    assert!(page.contains(&format!("<caption>{count} collectives</caption>")));
    // Rank 0 holds what the plan says; nothing divides by three, so the last rank holds less.
    let text = text_of(&page);
    let line = plan.lines().find_map(|l| l.strip_prefix("  weights ")).unwrap();
    let line = format!("weights {}", line.replace(", ", " · "));
    let held: Vec<&str> =
        text.lines().filter(|l| l.starts_with("weights ") && l.contains("activations")).collect();
    assert_eq!((held.len(), held[0]), (3, line.as_str()), "{held:?}");
    assert_ne!(held[0], held[2]);
    for ranks in ["1 rank", "2 ranks", "3 ranks this plan", "4 ranks", "8 ranks"] {
        assert!(text.lines().any(|l| l.starts_with(ranks)), "{ranks}");
    }
}

#[test]
fn a_number_of_ranks_that_does_not_fit_says_so() {
    let scratch = scratch();
    let folder = scratch.path().join("out");
    shard(4, &folder, &["--memory", "2MB"]);
    let text = text_of(&page(&folder));
    let line = text.lines().find(|l| l.starts_with("1 rank ")).unwrap();
    assert!(line.contains("does not fit: needs "), "{line}");
}

/// A model may call its nodes what it likes.
#[test]
fn a_hostile_name_stays_text() {
    let scratch = scratch();
    let mut bytes = fs::read(model()).unwrap();
    let name = b"/model/model/layers.0/mlp/gate_proj/MatMul";
    let evil = b"/model/layers.0/<script>alert(1)</script>/";
    assert_eq!(name.len(), evil.len());
    let places: Vec<usize> =
        bytes.windows(name.len()).enumerate().filter(|(_, w)| w == name).map(|(i, _)| i).collect();
    assert!(!places.is_empty());
    for place in places {
        bytes[place..place + name.len()].copy_from_slice(evil);
    }
    let (path, folder) = (scratch.path().join("<img src=x>.onnx"), scratch.path().join("out"));
    fs::write(&path, bytes).unwrap();
    end(&mut tpshard(words![path, "--tp", "2", "-o", folder])).ok();
    let page = page(&folder);
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;") && page.contains("&lt;img src=x&gt;"));
    assert!(!page.contains("<script>alert") && !page.contains("<img"));
}

#[test]
fn a_changed_page_is_found() {
    let scratch = scratch();
    let folder = copy_of_sharded(2, &scratch);
    let path = folder.join("report.html");
    fs::write(&path, page(&folder).replacen("2 ranks", "4 ranks", 1)).unwrap();
    let check = || end(&mut tpshard(words!["check", folder]));
    check().fails(4, &["report.html: is not the text"]);
    fs::remove_file(&path).unwrap();
    check().fails(4, &["report.html"]);
}
