//! Every target takes its seeds, and whatever was found once.

use std::path::Path;

#[test]
fn seeds_and_findings_are_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    for (name, target) in cohort_fuzz::TARGETS {
        let entries = std::fs::read_dir(folder.join(name)).unwrap_or_else(|error| {
            panic!("the seeds of `{name}` cannot be read: {error}");
        });
        let mut seeds = 0;
        for entry in entries {
            let path = entry.expect("a seed").path();
            target(&std::fs::read(&path).unwrap_or_else(|error| panic!("{path:?}: {error}")));
            seeds += 1;
        }
        assert!(seeds > 0, "`{name}` has no seed");
    }
}
