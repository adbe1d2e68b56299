//! The sharding table as text: one line per instance. `TPSHARD_BLESS=1` rewrites the file after a wanted change.

mod instances;

use std::fmt::Write;
use std::path::Path;
use tpshard_ir::Type;
use tpshard_passes::sharding::rule_text;

#[test]
fn the_table_is_as_written_down() {
    let mut found = String::new();
    for instance in instances::all() {
        let args: Vec<&Type> = instance.args.iter().collect();
        let types: Vec<String> = args.iter().map(|ty| ty.to_string()).collect();
        let _ = writeln!(found, "{} ({}) -> {}", instance.name, types.join(", "), instance.result);
        let _ = writeln!(found, "    {}", rule_text(&instance.op, &args, &instance.result));
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sharding_rules.txt");
    if std::env::var_os("TPSHARD_BLESS").is_some() {
        std::fs::write(&file, &found).unwrap();
    }
    let expected = std::fs::read_to_string(&file).unwrap_or_default();
    for (line, (is, was)) in found.lines().zip(expected.lines()).enumerate() {
        assert_eq!(is, was, "line {}; TPSHARD_BLESS=1 accepts it", line + 1);
    }
    assert_eq!(found.lines().count(), expected.lines().count(), "TPSHARD_BLESS=1 accepts it");
}
