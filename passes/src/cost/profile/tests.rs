//! Built-in profiles parse, say no sparse figures, and price what their sources say.

use super::*;

fn built_in(name: &str) -> Profile {
    Profile::built_in(name).unwrap()
}

#[test]
fn built_in_profiles_carry_their_names_and_are_sorted() {
    for name in Profile::names() {
        let profile = built_in(name);
        assert_eq!(profile.name, name);
        assert!(profile.bandwidth() < profile.memory_bandwidth);
        assert_eq!(profile.shared_ranks.is_some(), name.starts_with("cpu"), "{name}");
    }
    assert!(Profile::names().is_sorted());
}

#[test]
fn every_source_can_be_checked() {
    for (name, text) in BUILT_IN {
        for line in text.lines().filter(|l| !l.starts_with('#') && !l.starts_with("name")) {
            let source = line.split_once('|').map_or("", |(_, s)| s.trim());
            assert!(!source.contains("recalled"), "{name}: {line}");
            let cited = [
                "http",
                "github.com",
                "NCCL",
                "estimate",
                "measured",
                "#",
                "specification",
                "hellomatik.com",
            ];
            assert!(cited.iter().any(|c| source.contains(c)), "{name}: {line}");
        }
    }
}

#[test]
fn peaks_are_dense() {
    let bf16 = |name| built_in(name).data_sheet_peak(DType::BF16);
    for (name, dense) in [
        ("a10", 125e12),
        ("a100-pcie-80", 312e12),
        ("a100-sxm-80", 312e12),
        ("b200", 2250e12),
        ("h100-pcie", 756e12),
        ("h100-sxm", 989e12),
        ("h200-sxm", 989e12),
        ("h800-sxm", 989e12),
        ("l4", 121e12),
        ("l40s", 362e12),
    ] {
        assert_eq!(bf16(name), dense, "{name}");
        let profile = built_in(name);
        assert_eq!(profile.data_sheet_peak(DType::F16), dense);
        // The other half of the trap: int8 is twice bf16, four times would be sparse.
        let ratio = profile.data_sheet_peak(DType::I8) / dense;
        assert!((1.9..2.1).contains(&ratio), "{name}: {ratio}");
    }
    assert_eq!(bf16("h100-sxm-ib-ndr"), bf16("h100-sxm"));
    assert!(built_in("h100-sxm").peak(DType::F32) < built_in("h100-sxm").peak(DType::F16));
}

#[test]
fn the_fastest_protocol_for_a_size_is_used() {
    let profile = built_in("h100-sxm");
    let small = profile.collective(2.0, 8192.0);
    assert!((small - (6.6e-6 + 1.2e-6 + 8192.0 / 141e9)).abs() < 1e-15);
    let large = profile.collective(2.0, 1e9);
    assert!((large - (8.4e-6 + 6.8e-6 + 1e9 / 370e9)).abs() < 1e-12);
    // The switch's all-reduce overtakes the ring's when the tensor is large, never for a few bytes.
    let (few, many) = (16e3, 1e9);
    let ring = |bytes: f64| profile.collective(14.0, 1.75 * bytes);
    assert_eq!(profile.collective_time(Collective::AllReduce, 8, few), ring(few));
    let switch = profile.collective_time(Collective::AllReduce, 8, many);
    assert!((switch - (25e-6 + 1.75 * many / 480e9)).abs() < 1e-9, "{switch}");
}

#[test]
fn rings_of_every_size_cost_what_nccl_says() {
    // NCCL's ring LL on NVLink: 7.8, 10.2 and 15.0 us for 2, 4 and 8 ranks; on PCIe 8.6, 12.6 and 20.6.
    for (name, expected) in [("a100-sxm-80", [7.8, 10.2, 15.0]), ("a100-pcie-80", [8.6, 12.6, 20.6])] {
        for (ranks, microseconds) in [2, 4, 8].into_iter().zip(expected) {
            let seconds = built_in(name).collective_time(Collective::AllReduce, ranks, 1.0);
            assert!((seconds * 1e6 - microseconds).abs() < 1e-3, "{name} {ranks}: {seconds}");
        }
    }
}

#[test]
fn every_collective_has_a_price_that_grows() {
    for name in Profile::names() {
        let profile = built_in(name);
        for collective in Collective::ALL {
            assert_eq!(profile.collective_time(collective, 1, 1e6), 0.0);
            for ranks in [2, 3, 8, 16, 64] {
                let time = |bytes| profile.collective_time(collective, ranks, bytes);
                assert!(time(1.0) > 0.0 && time(1e9).is_finite(), "{name} {}", collective.name());
                assert!(time(1e3) <= time(1e6) && time(1e6) < time(1e9));
            }
        }
        let reduce = |ranks| profile.collective_time(Collective::AllReduce, ranks, 1e6);
        let gather = |ranks| profile.collective_time(Collective::AllGather, ranks, 1e6);
        assert!(reduce(4) > gather(4) && gather(4) > gather(2), "{name}");
    }
}

#[test]
fn ranks_beyond_a_node_pay_for_the_network() {
    let (alone, joined) = (built_in("h100-sxm"), built_in("h100-sxm-ib-ndr"));
    for collective in Collective::ALL {
        let time = |profile: &Profile, ranks| profile.collective_time(collective, ranks, 64e6);
        assert_eq!(time(&joined, 8), time(&alone, 8));
        if collective != Collective::Transfer {
            assert!(time(&joined, 16) > time(&joined, 8), "{}", collective.name());
        }
    }
    // Two nodes, 1 GB: the ring is bound by the slower of NVLink and eight network cards.
    let seconds = joined.collective_time(Collective::AllReduce, 16, 1e9);
    assert!(seconds > 1.875 * 1e9 / 376e9 && seconds < 2.0 * 1.875 * 1e9 / 370e9, "{seconds}");
    let slow = built_in("a100-sxm-80-roce-100");
    let ratio = slow.collective_time(Collective::AllReduce, 16, 1e9)
        / slow.collective_time(Collective::AllReduce, 8, 1e9);
    assert!(ratio > 2.0, "{ratio}");
    assert_eq!(joined.span(16), Span { local: 8, nodes: 2 });
    assert_eq!(joined.span_of_axes(&[2, 8], &[1]), Span { local: 8, nodes: 1 });
    assert_eq!(joined.span_of_axes(&[2, 8], &[0]), Span { local: 1, nodes: 2 });
    assert_eq!(joined.span_of_axes(&[4, 4], &[0]), Span { local: 2, nodes: 2 });
    assert_eq!(alone.span_of_axes(&[4, 4], &[0, 1]), Span { local: 16, nodes: 1 });
}

#[test]
fn a_machine_is_divided_between_its_ranks() {
    let cpu = built_in("cpu-shm");
    let measured = cpu.shared_ranks.unwrap();
    assert_eq!(cpu.shared_between(measured), cpu);
    let alone = cpu.shared_between(1);
    assert_eq!(alone.peak(DType::F32), cpu.peak(DType::F32) * measured as f64);
    assert_eq!(alone.bandwidth(), cpu.bandwidth() * measured as f64);
    assert_eq!(alone.shared_between(measured).peak(DType::F32), cpu.peak(DType::F32));
    let gpu = built_in("h100-sxm");
    assert_eq!(gpu.shared_between(1), gpu);
}

/// docs/cost-model.md: about 2, 5 and 2 ranks for hidden 8192.
#[test]
fn the_rule_of_thumb_holds() {
    let prefill = Prefill::of_hidden(8192.0);
    let sheets = [(312e12, 32e9), (989e12, 450e9), (989e12, 200e9)];
    // The rule; the formula with data-sheet numbers; the profile's prices with rings only; all its prices.
    let expected = [
        ("a100-pcie-80", 2.0, 1.84, 1.90, 1.90),
        ("h100-sxm", 5.0, 4.73, 5.12, 6.39),
        ("h800-sxm", 2.0, 2.66, 2.86, 3.47),
    ];
    for ((peak, link), (name, rule, sheet, rings, own)) in sheets.into_iter().zip(expected) {
        let profile = built_in(name);
        let mut ringed = profile.clone();
        ringed.protocols.retain(|p| p.algorithm == Algorithm::Ring);
        let found = [
            prefill.ranks(peak, link),
            ringed.ranks_that_pay(&prefill, 64),
            profile.ranks_that_pay(&prefill, 64),
        ];
        for (found, expected) in found.iter().zip([sheet, rings, own]) {
            assert!((found - expected).abs() < 0.01, "{name}: {found:?}");
        }
        assert!((found[0] - rule).abs() < 1.0 && (found[1] - rule).abs() < 1.0, "{name}: {found:?}");
    }
    // A small hidden size does not pay anywhere; a machine without a limit pays for all.
    let small = Prefill::of_hidden(512.0);
    assert!(built_in("a100-pcie-80").ranks_that_pay(&small, 64) < 1.1);
    assert_eq!(built_in("b200").ranks_that_pay(&Prefill::of_hidden(1e6), 8), 8.0);
}

#[test]
fn wrong_lines_are_named() {
    let good = built_in("a100-pcie-80").text;
    let with = |line: &str| Profile::parse(&format!("{line}\n{good}"));
    for bad in [
        "speed = 1 | guess",
        "memory_bytes = 1",
        "memory_bytes = 1 | ",
        "memory_bytes = -1 | guess",
        "memory_bytes = inf | guess",
        "memory_bytes = NaN | guess",
        "memory_fraction = 1.5 | guess",
        "memory_bytes",
        "shared_ranks = 1.5 | guess",
        "node_ranks = 0 | guess",
        "protocol. = base 1 step 1 bandwidth 1 | guess",
        "protocol.x = base 1 step 1 | guess",
        "protocol.x = base 1 step 1 bandwidth | guess",
        "protocol.x = base 1 base 1 step 1 bandwidth 1 | guess",
        "protocol.x = base 1 bandwidth 1 | guess",
        "protocol.x = star base 1 step 1 bandwidth 1 | guess",
        "protocol.x = ring base 1 step 0 bandwidth 1 | guess",
        "protocol.x = ring base 1 step 1 bandwidth 1 ranks 2 | guess",
        "protocol.x = switch base 1 step 1 bandwidth 1 | guess",
        "protocol.x = measured all-reduce base 1 bandwidth 1 | guess",
        "protocol.x = measured broadcast ranks 2 base 1 bandwidth 1 | guess",
        "protocol.x = measured all-reduce ranks 2000 base 1 bandwidth 1 | guess",
    ] {
        assert!(matches!(with(bad), Err(ProfileError::Line { line: 1, .. })), "{bad}");
    }
    // The second mention is the one in the file proper.
    assert!(matches!(with("memory_bytes = 1 | guess"), Err(ProfileError::Line { line: 2.., .. })));
    assert!(matches!(with("name = x"), Err(ProfileError::Line { line: 2.., .. })));
    let network = "protocol.inter.x = ring base 1 step 1 bandwidth 1 | guess";
    assert_eq!(with(network), Err(ProfileError::Missing { quantity: "node_ranks" }));
    assert_eq!(
        with("node_ranks = 8 | guess"),
        Err(ProfileError::Missing { quantity: "protocol.inter.NAME" })
    );
    assert!(with(&format!("node_ranks = 8 | guess\n{network}")).is_ok());
    let without = |key: &str| {
        let text: Vec<&str> = good.lines().filter(|l| !l.starts_with(key)).collect();
        Profile::parse(&text.join("\n"))
    };
    for key in ["name", "memory_bytes", "peak.f32", "protocol."] {
        assert!(matches!(without(key), Err(ProfileError::Missing { .. })), "{key}");
    }
    assert!(matches!(Profile::built_in("abacus"), Err(ProfileError::Unknown { .. })));
    assert!(matches!(Profile::parse(&" ".repeat(MAX_TEXT + 1)), Err(ProfileError::TooLong { .. })));
}

#[test]
fn what_was_measured_is_believed() {
    let text = built_in("cpu-shm").text
        + "protocol.m1 = measured all-reduce ranks 2 up_to 4096 base 1e-3 bandwidth 1e9 | measured\n\
           protocol.m2 = measured all-reduce ranks 2 base 2e-3 bandwidth 1e9 | measured\n";
    let profile = Profile::parse(&text).unwrap();
    let time = |collective, ranks, bytes| profile.collective_time(collective, ranks, bytes);
    assert_eq!(time(Collective::AllReduce, 2, 4096.0), 1e-3 + 4096.0 / 1e9);
    assert_eq!(time(Collective::AllReduce, 2, 1e6), 2e-3 + 1e-3);
    let estimated = built_in("cpu-shm");
    for (collective, ranks) in [(Collective::AllReduce, 4), (Collective::AllGather, 2)] {
        assert_eq!(time(collective, ranks, 1e6), estimated.collective_time(collective, ranks, 1e6));
    }
}

fn with_kernels(lines: &str) -> Result<Profile, ProfileError> {
    Profile::parse(&format!("{}\n{lines}", Profile::built_in_text("cpu-shm").unwrap()))
}

#[test]
fn measured_kernels_belong_to_a_number_of_ranks() {
    let text = "kernel.product.1 = call 1e-6 operation 1e-11 | measured\n\
                kernel.product.2 = call 2e-6 operation 2e-11 | measured";
    let profile = with_kernels(text).unwrap();
    let call = |ranks: usize| {
        let shared = profile.shared_between(ranks);
        assert_eq!(shared.kernels.keys().copied().collect::<Vec<_>>(), [ranks]);
        shared.kernels[&ranks][&Family::Product].call
    };
    assert_eq!(call(1), 1e-6);
    assert_eq!(call(2), 2e-6);
    // Twice as many ranks as were measured have half of the machine each.
    assert_eq!(call(4), 4e-6);
    assert_eq!(built_in("h100-sxm").shared_between(4).kernels.len(), 0);
}

#[test]
fn kernels_that_are_no_kernels_are_refused() {
    for (line, what) in [
        ("kernel.product = call 1e-6 | x", "`kernel.FAMILY.RANKS`"),
        ("kernel.gemm.2 = call 1e-6 | x", "`gemm` is not a family"),
        ("kernel.product.0 = call 1e-6 | x", "not a number of ranks"),
        ("kernel.product.2 = flop 1e-6 | x", "`flop` is not one of"),
        ("kernel.product.2 = call 1e-6 | x\nkernel.product.2 = call 1e-6 | x", "given twice"),
    ] {
        let error = with_kernels(line).unwrap_err().to_string();
        assert!(error.contains(what), "{line}: {error}");
    }
}
