//! The Kubernetes manifests: that they fit together. What the API itself would refuse is `deploy/validate.sh`'s to find.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{check_arguments, check_grace, files, list, repository, strings, text, yaml};

/// All objects of the Kubernetes manifests, each with the file it is from.
fn manifests() -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for path in files("deploy/kubernetes/base", "yaml") {
        let name = path.file_name().expect("a name").to_string_lossy();
        for document in yaml(&path) {
            found.push((name.clone().into_owned(), document));
        }
    }
    found
}

#[test]
fn kustomization_names_every_manifest() {
    let all = manifests();
    let (_, kustomization) = all
        .iter()
        .find(|(file, _)| file == "kustomization.yaml")
        .expect("a kustomization");
    let named: BTreeSet<String> = strings(&kustomization["resources"]).into_iter().collect();
    let there = all.iter().map(|(file, _)| file.clone());
    let there: BTreeSet<String> = there.filter(|f| f != "kustomization.yaml").collect();
    assert_eq!(named, there);
}

#[test]
fn kubernetes_manifests_are_sound() {
    let all = manifests();
    let made = list(&all[index_of(&all, "Kustomization")].1, "/secretGenerator");
    let secrets: Vec<&str> = made.iter().map(|secret| text(secret, "/name")).collect();
    let mut workloads = BTreeSet::new();
    for (file, object) in &all {
        let kind = text(object, "/kind");
        text(object, "/apiVersion");
        if kind != "Kustomization" {
            text(object, "/metadata/name");
        }
        if matches!(kind, "Deployment" | "StatefulSet") {
            check_workload(file, object, &secrets);
            workloads.insert(kind);
        }
    }
    assert_eq!(workloads.len(), 2, "a StatefulSet and a Deployment");
    let service = &all[index_of(&all, "Service")].1;
    let set = &all[index_of(&all, "StatefulSet")].1;
    assert_eq!(
        text(set, "/spec/serviceName"),
        text(service, "/metadata/name")
    );
    assert_eq!(
        service["spec"]["selector"],
        set["spec"]["selector"]["matchLabels"]
    );
    assert_eq!(set["spec"]["replicas"], 1, "one coordinator owns the home");
}

#[test]
fn overlays_patch_what_is_there() {
    let base = manifests();
    for overlay in ["gpu", "failover"] {
        let folder = format!("deploy/kubernetes/{overlay}");
        let [kustomization] = &yaml(&repository(&format!("{folder}/kustomization.yaml")))[..]
        else {
            panic!("{folder}: one document");
        };
        assert_eq!(strings(&kustomization["resources"]), ["../base"]);
        for patch in list(kustomization, "/patches") {
            let path = repository(&format!("{folder}/{}", text(patch, "/path")));
            for document in yaml(&path) {
                let target = &base[index_of(&base, text(&document, "/kind"))].1;
                let name = text(target, "/metadata/name");
                assert_eq!(text(&document, "/metadata/name"), name, "{folder}");
                for container in list(&document, "/spec/template/spec/containers") {
                    let known = list(target, "/spec/template/spec/containers");
                    let there = known.iter().any(|known| known["name"] == container["name"]);
                    assert!(there, "{folder}: {container}");
                }
            }
        }
    }
}

fn index_of(all: &[(String, Value)], kind: &str) -> usize {
    let found = all.iter().position(|(_, object)| object["kind"] == kind);
    found.unwrap_or_else(|| panic!("no {kind}"))
}

fn check_workload(file: &str, object: &Value, secrets: &[&str]) {
    let labels = object.pointer("/spec/template/metadata/labels");
    assert_eq!(
        labels,
        object.pointer("/spec/selector/matchLabels"),
        "{file}"
    );
    let pod = &object["spec"]["template"]["spec"];
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{file}");
    let volumes: BTreeSet<&str> = list(pod, "/volumes")
        .iter()
        .map(|volume| text(volume, "/name"))
        .chain(
            list(object, "/spec/volumeClaimTemplates")
                .iter()
                .map(|claim| text(claim, "/metadata/name")),
        )
        .collect();
    for volume in list(pod, "/volumes") {
        if volume.get("secret").is_some() {
            let name = text(volume, "/secret/secretName");
            assert!(secrets.contains(&name), "{file}: {name}");
        }
    }
    let containers = list(pod, "/containers");
    assert!(!containers.is_empty(), "{file}: no container");
    for container in containers {
        let place = format!("{file}, container {}", text(container, "/name"));
        let arguments = strings(&container["args"]);
        check_arguments(&place, &arguments);
        let waits = pod["terminationGracePeriodSeconds"].as_u64();
        check_grace(&place, &arguments, waits.expect("seconds"));
        for mount in list(container, "/volumeMounts") {
            let name = text(mount, "/name");
            assert!(volumes.contains(name), "{place}: no volume `{name}`");
        }
    }
}
