//! Which instructions kernels are compiled for, chosen once per process.
//!
//! Kernels are plain Rust over arrays of sixteen floats. Each is compiled several times, for wider and narrower
//! registers; as every operation is one of IEEE 754 with a fixed order, all compilations give the same bits.
#![allow(unsafe_code, reason = "code compiled for instructions that were found at run time")]

use std::sync::OnceLock;

/// Names an instruction set to use instead of the best one: `avx512`, `avx2` or `portable`.
pub(crate) const ISA_VARIABLE: &str = "TPSHARD_ISA";

/// A set of instructions, by the registers a kernel may count on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// 32 registers of 16 floats.
    Avx512,
    /// 16 registers of 8 floats.
    Avx2,
    /// What every machine of this architecture has.
    Portable,
}

impl Isa {
    #[cfg(test)]
    pub(crate) const ALL: [Isa; 3] = [Isa::Avx512, Isa::Avx2, Isa::Portable];

    fn name(self) -> &'static str {
        match self {
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Portable => "portable",
        }
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn is_there(self) -> bool {
        match self {
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && Isa::Avx2.is_there()
            }
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            Isa::Portable => true,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn is_there(self) -> bool {
        self == Isa::Portable
    }

    /// The best one that is there, or the one the environment asks for.
    ///
    /// # Errors
    /// The environment names one that does not exist or is not there.
    pub(crate) fn chosen() -> Result<Isa, String> {
        static CHOSEN: OnceLock<Result<Isa, String>> = OnceLock::new();
        CHOSEN.get_or_init(|| Isa::choose(std::env::var(ISA_VARIABLE).ok().as_deref())).clone()
    }

    fn choose(wanted: Option<&str>) -> Result<Isa, String> {
        let all = [Isa::Avx512, Isa::Avx2, Isa::Portable];
        let found = match wanted {
            None => all.into_iter().find(|isa| isa.is_there()),
            Some(name) => all.into_iter().find(|isa| isa.name() == name && isa.is_there()),
        };
        found.ok_or_else(|| {
            let there: Vec<&str> = all.into_iter().filter(|isa| isa.is_there()).map(Isa::name).collect();
            format!(
                "{ISA_VARIABLE}={}: this machine has not such instructions\n  help: unset it, or set it to one of: {}",
                wanted.unwrap_or_default(),
                there.join(", ")
            )
        })
    }
}

/// Calls `kernel`, compiled for the chosen instructions, with what they are. All that it calls has to be inlined into
/// it, itself included.
#[inline(always)]
pub(crate) fn vectorised<R>(kernel: impl FnOnce(Isa) -> R) -> R {
    // A wrong choice was an error when the session opened.
    vectorised_for(Isa::chosen().unwrap_or(Isa::Portable), kernel)
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn vectorised_for<R>(isa: Isa, kernel: impl FnOnce(Isa) -> R) -> R {
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
    fn avx512<R>(kernel: impl FnOnce(Isa) -> R) -> R {
        kernel(Isa::Avx512)
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2<R>(kernel: impl FnOnce(Isa) -> R) -> R {
        kernel(Isa::Avx2)
    }
    match isa {
        // SAFETY: both are only ever chosen after their features were found.
        Isa::Avx512 => unsafe { avx512(kernel) },
        Isa::Avx2 => unsafe { avx2(kernel) },
        Isa::Portable => kernel(Isa::Portable),
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(crate) fn vectorised_for<R>(_: Isa, kernel: impl FnOnce(Isa) -> R) -> R {
    kernel(Isa::Portable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_that_cannot_be_kept_is_an_error_with_a_remedy() {
        assert_eq!(Isa::choose(Some("portable")), Ok(Isa::Portable));
        let error = Isa::choose(Some("mmx")).unwrap_err();
        assert!(error.contains("TPSHARD_ISA=mmx") && error.contains("portable"), "{error}");
    }
}
