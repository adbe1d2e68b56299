//! Every square of every instance on every mesh is executed: random families that decode to random operands go through
//! the operation as each rank has it, and what comes out must decode to the logical result. Arithmetic is that of a
//! prime field, so equality is exact and no rounding hides a wrong square.

mod instances;

use instances::execute::{execute, meshes, square_text, squares_of};
use tpshard_ir::{AxisLayout, Layout, Mesh};

#[test]
fn every_square_holds() {
    let mut failures = Vec::new();
    for mesh in meshes() {
        let mut count = 0;
        for (i, instance) in instances::all().iter().enumerate() {
            for square in squares_of(instance, &mesh) {
                count += 1;
                if let Err(what) = execute(instance, &mesh, &square, i as u64 + 1) {
                    failures.push(format!("{} on {mesh}: {}: {what}", instance.name, square_text(&square)));
                }
            }
        }
        println!("{count} squares on {mesh}");
        assert!(count > 300, "{count} squares on {mesh}");
    }
    assert!(failures.is_empty(), "{} squares fail:\n{}", failures.len(), failures.join("\n"));
}

/// A test that cannot fail proves nothing: squares with one layout changed must not hold.
#[test]
fn wrong_squares_are_noticed() {
    let mesh = Mesh::flat(2);
    let (mut wrong, mut noticed) = (0, 0);
    for instance in instances::all().iter().filter(|i| !i.args.is_empty()) {
        for square in squares_of(instance, &mesh) {
            let AxisLayout::Shard { .. } = square.result.0[0] else { continue };
            if square.operands.iter().all(Layout::is_replicated) {
                continue;
            }
            let mut changed = square.clone();
            changed.result = Layout(vec![AxisLayout::Replicated]);
            wrong += 1;
            noticed += usize::from(execute(instance, &mesh, &changed, 1).is_err());
        }
    }
    assert!(wrong > 100);
    assert_eq!(noticed, wrong);
}
