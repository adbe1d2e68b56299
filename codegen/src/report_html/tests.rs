use super::*;
use tpshard_ir::{AxisLayout, Monoid};

const EVIL: &str = "<script>alert(1)</script>\"'&";

/// A step that computes for a microsecond.
pub(super) fn step(operation: &str, origin: &str) -> Step {
    Step {
        role: Role::Computes,
        operation: operation.into(),
        name: String::new(),
        origin: origin.into(),
        ty: "f32[2, 8]".into(),
        layout: Layout(vec![AxisLayout::shard(1, 1usize)]),
        bytes: 16,
        time: Time { compute: 1e-6, ..Time::default() },
    }
}

fn collective(kind: &str, seconds: f64) -> Collective {
    Collective { kind: kind.into(), origin: "/mlp".into(), ranks: 4, count: 2, payload: 4096, seconds }
}

fn report() -> Report {
    let reduce = Step {
        role: Role::Communicates,
        layout: Layout(vec![AxisLayout::Replicated]),
        time: Time { communication: 2e-6, ..Time::default() },
        ..step("all_reduce", "/layers.0/mlp/MatMul")
    };
    let partial = Step {
        layout: Layout(vec![AxisLayout::Partial(Monoid::Sum)]),
        ..step("einsum", "/layers.0/mlp/MatMul")
    };
    let weight = Step { role: Role::Stored, name: "w".into(), ..step("weight", "/layers.0/mlp/MatMul") };
    let time = Time { compute: 2e-6, memory: 1e-6, launch: 1e-6, communication: 5e-6 };
    Report {
        model: "model.onnx".into(),
        profile: "h100-sxm".into(),
        mesh: Mesh::flat(4),
        seconds: 9e-6,
        seconds_alone: 18e-6,
        verdict: "2.00x as fast as one rank".into(),
        gap: 0.0125,
        warnings: Vec::new(),
        scaling: vec![
            Scaling {
                ranks: 1,
                chosen: false,
                outcome: Ok(vec![Time { compute: 18e-6, ..Time::default() }]),
            },
            Scaling { ranks: 2, chosen: false, outcome: Err("needs 1.00 GiB per rank".into()) },
            Scaling { ranks: 4, chosen: true, outcome: Ok(vec![time]) },
        ],
        scaling_note: None,
        memory: Memory {
            ranks: vec![RankBytes { weights: 2048, state: 1024, activations: 512 }; 4],
            budget: None,
            device: 80 << 30,
            least: 2048,
            alone: 8192,
        },
        stored: vec![Stored {
            name: "layers.*.w".into(),
            is_state: false,
            shape: "f32[8, 8]".into(),
            layout: Layout(vec![AxisLayout::shard(0, 2usize)]),
            count: 8,
            bytes: 2048,
        }],
        entries: vec![Entry {
            name: "main".into(),
            dims: "batch=1".into(),
            weight: 1.0,
            time,
            steps: vec![weight, partial, reduce],
            collectives: vec![collective("all_reduce", 3e-6), collective("all_gather", 1e-6)],
            outputs: vec![("logits".into(), Layout(vec![AxisLayout::shard(2, 1usize)]))],
        }],
    }
}

/// The tags of a page, in order, checked to be closed in order.
fn check_structure(page: &str) {
    const VOID: [&str; 2] = ["meta", "!DOCTYPE"];
    let (body, mut open) = (without(page, "style"), Vec::new());
    let body = without(&body, "script");
    let mut rest = body.as_str();
    while let Some(start) = rest.find('<') {
        let end = start + rest[start..].find('>').expect("a tag ends");
        let tag = &rest[start + 1..end];
        let name: &str = tag.trim_start_matches('/').split([' ', '\n']).next().unwrap_or_default();
        match tag.strip_prefix('/') {
            Some(_) => assert_eq!(open.pop(), Some(name.to_owned()), "…{}", &rest[..end]),
            None if VOID.contains(&name) => {}
            None => open.push(name.to_owned()),
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty(), "{open:?}");
}

/// A page without what stands between tags of this name.
fn without(page: &str, tag: &str) -> String {
    let (start, end) = (format!("<{tag}>"), format!("</{tag}>"));
    let mut text = String::new();
    let mut rest = page;
    while let Some((before, after)) = rest.split_once(&start) {
        text.push_str(before);
        rest = after.split_once(&end).expect("closed").1;
    }
    text + rest
}

#[test]
fn a_page_is_well_formed_and_says_the_same_every_time() {
    let page = render(&report());
    check_structure(&page);
    assert_eq!(page, render(&report()));
    for id in ["time", "memory", "graph", "collectives", "stored"] {
        assert!(
            page.contains(&format!("<section id=\"{id}\">")) && page.contains(&format!("href=\"#{id}\"")),
            "{id}"
        );
    }
}

#[test]
fn nothing_is_loaded() {
    let page = render(&report());
    for word in
        ["http:", "https:", "url(", "src=", "@import", "<link", "<img", "<iframe", "eval(", "innerHTML"]
    {
        assert!(!page.contains(word), "{word}");
    }
    assert!(page.contains("content=\"default-src 'none'; "));
    let references: Vec<&str> = page.split("href=\"").skip(1).collect();
    assert!(!references.is_empty() && references.iter().all(|r| r.starts_with('#')));
}

#[test]
fn names_cannot_become_markup() {
    let mut evil = report();
    let text = || EVIL.to_owned();
    evil.model = text();
    evil.profile = text();
    evil.verdict = text();
    evil.warnings = vec![text()];
    evil.scaling_note = Some(text());
    evil.scaling[1].outcome = Err(text());
    evil.stored[0].name = text();
    evil.stored[0].shape = text();
    let mut entry = evil.entries[0].clone();
    entry.name = text();
    entry.dims = text();
    entry.outputs[0].0 = text();
    entry.collectives[0].kind = text();
    entry.collectives[0].origin = text();
    for step in &mut entry.steps {
        step.operation = text();
        step.name = text();
        step.origin = format!("/layers.1/{EVIL}/{EVIL}");
        step.ty = text();
    }
    let mut layer = entry.steps[0].clone();
    layer.origin = format!("/{EVIL}.7/x/MatMul");
    entry.steps.push(layer);
    evil.entries.push(entry);
    let page = render(&evil);
    assert!(!page.contains("<script>alert") && !page.contains("\"'&"), "{page}");
    assert_eq!(page.matches("<script>").count(), 1);
    assert!(page.matches("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#39;&amp;").count() > 20);
    check_structure(&page);
}

#[test]
fn every_collective_is_listed_and_all_add_up() {
    let page = render(&report());
    for kind in ["all_reduce", "all_gather"] {
        assert!(page.contains(&format!("⇄ {kind}</span></th>")), "{kind}");
    }
    assert!(page.contains("4 collectives"), "{page}");
    // 3 µs and 1 µs of 5 µs; the rest collects one output.
    assert!(page.contains("all collectives</th><td class=\"n\" data-key=\"4\">4</td>"));
    assert!(page.contains(">4.00 µs</td>") && page.contains("collecting split outputs on rank 0"));
    assert!(page.contains(">1.00 µs</td>"));
    let mut none = report();
    none.entries[0].collectives.clear();
    assert!(render(&none).contains("No collectives run."));
}

#[test]
fn what_a_model_makes_long_is_cut_and_counted() {
    let mut long = report();
    let entry = &mut long.entries[0];
    // No two alike, so nothing folds.
    entry.steps = (0..100_000).map(|i| Step { bytes: i, ..step("mul", &format!("/a{i}/Mul")) }).collect();
    entry.collectives = (0..5000).map(|_| collective("all_reduce", 1e-9)).collect();
    entry.outputs = (0..5000).map(|i| (format!("o{i}"), Layout(vec![AxisLayout::Replicated]))).collect();
    long.stored = (0..5000).map(|_| long.stored[0].clone()).collect();
    long.memory.ranks = (0..1024).map(|i| RankBytes { weights: 1024 - i, ..RankBytes::default() }).collect();
    let page = render(&long);
    check_structure(&page);
    assert!(page.len() < 4 << 20, "{}", page.len());
    for count in
        ["96000 further steps", "4600 further rows", "4600 further outputs", "960 more groups of ranks"]
    {
        assert!(page.contains(count), "{count}");
    }
    assert!(page.contains(">10000</td>"), "the counts of all rows, hidden or not");
}

#[test]
fn entries_that_are_several_are_named() {
    let mut two = report();
    let mut second = two.entries[0].clone();
    (two.entries[0].name, second.name) = ("decode".into(), "prefill".into());
    two.entries.push(second);
    two.scaling
        .iter_mut()
        .filter_map(|s| s.outcome.as_mut().ok())
        .for_each(|times| times.extend_from_within(..));
    let page = render(&two);
    check_structure(&page);
    for heading in
        ["<bdi>decode</bdi>", "<bdi>prefill</bdi>", "decode: 4 collectives", "prefill: 4 collectives"]
    {
        assert!(page.contains(heading), "{heading}");
    }
}
