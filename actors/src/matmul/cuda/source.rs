//! The kernels' source, as it is compiled at run time for the device that is found.

/// Joins files, each under its own name for the compiler's messages.
macro_rules! files {
    ($($name:literal),*) => {
        /// All files in the order in which they build on one another, by name.
        pub const FILES: &[(&str, &str)] = &[$(($name, include_str!(concat!("kernels/", $name)))),*];

        /// The kernels as one translation unit, which needs no headers.
        pub const SOURCE: &str =
            concat!($("#line 1 \"", $name, "\"\n", include_str!(concat!("kernels/", $name))),*);
    };
}
files!("ptx.cuh", "values.cuh", "masks.cu", "tile.cuh", "product.cu", "hopper.cu", "biased.cu", "peak.cu");

/// Every entry point, on every device.
pub const KERNELS: &[&str] = &[
    "velum_expand_masks",
    "velum_product_l1",
    "velum_product_l2",
    "velum_product_l3",
    "velum_product_l4",
    "velum_product_l5",
    "velum_product_l6",
    "velum_bias",
    "velum_column_sums",
    "velum_finish_l1",
    "velum_finish_l2",
    "velum_finish_l3",
    "velum_finish_l4",
    "velum_finish_l5",
    "velum_finish_l6",
    "velum_register_loop",
];

/// Entry points that there are on compute capability 9.0 alone: the fused product with that device's own instructions.
pub const HOPPER_KERNELS: &[&str] = &[
    "velum_hopper_product_l1",
    "velum_hopper_product_l2",
    "velum_hopper_product_l3",
    "velum_hopper_product_l4",
    "velum_hopper_product_l5",
    "velum_hopper_product_l6",
];

/// Whether a device has [`HOPPER_KERNELS`].
pub fn has_hopper_kernels(capability: (u32, u32)) -> bool {
    capability == (9, 0)
}

/// The lowest compute capability that has the kernels' instructions.
pub const LEAST_CAPABILITY: (u32, u32) = (8, 0);

/// What the compiler is told, for machine code of a device of this compute capability.
///
/// Code for 9.0 is code for that capability alone (`sm_90a`), which has instructions that no later one has.
pub fn options(capability: (u32, u32)) -> Vec<String> {
    let (major, minor) = capability;
    let alone = if has_hopper_kernels(capability) { "a" } else { "" };
    vec![format!("--gpu-architecture=sm_{major}{minor}{alone}"), "--std=c++17".to_owned()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_point_is_in_the_source_and_named() {
        // Those of each number of limbs come from macros, which name them by `l##limbs`.
        let defined = SOURCE.matches("extern \"C\" __global__").count();
        let of_limbs = SOURCE.matches("##limbs(").count();
        assert_eq!(KERNELS.len() + HOPPER_KERNELS.len(), defined - of_limbs + 6 * of_limbs);
        for kernel in KERNELS.iter().chain(HOPPER_KERNELS) {
            let name = match kernel.strip_suffix(|digit: char| digit.is_ascii_digit()) {
                Some(stem) => format!("{stem}##limbs("),
                None => format!("{kernel}("),
            };
            assert_eq!(SOURCE.matches(&name).count(), 1, "{kernel}");
        }
    }

    #[test]
    fn instructions_are_in_one_file() {
        for (name, text) in FILES {
            assert_eq!(text.contains("asm "), *name == "ptx.cuh", "{name}");
            assert!(!text.contains("#include"), "{name}");
        }
    }

    #[test]
    fn the_architecture_is_the_devices() {
        assert!(options((8, 0)).contains(&"--gpu-architecture=sm_80".to_owned()));
        assert!(options((9, 0)).contains(&"--gpu-architecture=sm_90a".to_owned()));
        assert!(options((12, 0)).contains(&"--gpu-architecture=sm_120".to_owned()));
    }
}
