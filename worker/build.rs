//! Compiles the GPU's kernels, where the feature `cuda` is on.

#[cfg(feature = "cuda")]
fn main() -> cudaforge::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/engine/composite/cuda/kernels.cu");
    let out = std::env::var("OUT_DIR").expect("cargo says where to build");
    cudaforge::KernelBuilder::new()
        .source_files(["src/engine/composite/cuda/kernels.cu"])
        .arg("-std=c++17")
        .arg("-O3")
        .build_ptx()?
        .write(format!("{out}/kernels.rs"))
}

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
}
