package kubernetes

import (
	"slices"
	"testing"

	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Objects of the chart find each other: what a schema cannot say. Selectors fit the
// pod, ports have the names that others use, and what is named is there.
func TestChartReferences(t *testing.T) {
	eachValues(t, func(t *testing.T, name string) {
		rendered := render(t, name)
		docs, err := split(rendered)
		if err != nil {
			t.Fatal(err)
		}
		p := podOf(t, rendered)
		has := map[string]bool{} // :: kind/name
		for _, doc := range docs {
			kind, name := kind(t, doc)
			if has[kind+"/"+name] {
				t.Errorf("there are two of %s %s", kind, name)
			}
			has[kind+"/"+name] = true
		}
		port := func(what, name string) {
			t.Helper()
			if !slices.ContainsFunc(p.gatehouse.Ports, func(c corev1.ContainerPort) bool { return c.Name == name }) {
				t.Errorf("%s: the container has no port %q", what, name)
			}
		}
		fits := func(what string, s map[string]string) {
			t.Helper()
			if len(s) == 0 || !labels.SelectorFromSet(s).Matches(labels.Set(p.meta.Labels)) {
				t.Errorf("%s: selector %v does not fit the pod's labels %v", what, s, p.meta.Labels)
			}
		}
		for what, probe := range map[string]*corev1.Probe{"startup": p.gatehouse.StartupProbe, "readiness": p.gatehouse.ReadinessProbe, "liveness": p.gatehouse.LivenessProbe} {
			switch {
			case probe == nil:
				t.Errorf("there is no %s probe", what)
			case probe.HTTPGet != nil:
				port(what+" probe", probe.HTTPGet.Port.StrVal)
			case probe.TCPSocket != nil:
				port(what+" probe", probe.TCPSocket.Port.StrVal)
			case probe.GRPC != nil:
				if !slices.ContainsFunc(p.gatehouse.Ports, func(c corev1.ContainerPort) bool { return c.ContainerPort == probe.GRPC.Port }) {
					t.Errorf("%s probe: the container has no port %d", what, probe.GRPC.Port)
				}
			}
		}
		if account := p.ServiceAccountName; account != "" && account != "existing" && !has["ServiceAccount/"+account] {
			t.Errorf("there is no service account %q", account)
		}
		if p.ServiceAccountName != "" && (p.AutomountServiceAccountToken == nil || *p.AutomountServiceAccountToken) {
			t.Error("the pod has a token of the service account")
		}
		for _, c := range p.TopologySpreadConstraints {
			fits("topology spread", c.LabelSelector.MatchLabels)
		}

		var headless map[string]string
		var monitors []map[string]string
		for _, doc := range docs {
			switch kind, name := kind(t, doc); kind {
			case "Service":
				s := decode[corev1.Service](t, doc)
				fits("Service "+name, s.Spec.Selector)
				for _, sp := range s.Spec.Ports {
					if sp.TargetPort.Type != intstr.String {
						t.Errorf("Service %s, port %s: got target %v, want a name", name, sp.Name, sp.TargetPort)
					}
					port("Service "+name, sp.TargetPort.StrVal)
				}
				if s.Spec.ClusterIP == corev1.ClusterIPNone {
					headless = s.Labels
				} else if slices.ContainsFunc(s.Spec.Ports, func(sp corev1.ServicePort) bool { return sp.Name == "admin" }) {
					t.Errorf("Service %s has the admin port", name)
				}
			case "HorizontalPodAutoscaler":
				ref := decode[autoscalingv2.HorizontalPodAutoscaler](t, doc).Spec.ScaleTargetRef
				if !has[ref.Kind+"/"+ref.Name] {
					t.Errorf("autoscaler: there is no %s %s", ref.Kind, ref.Name)
				}
			case "PodDisruptionBudget":
				fits(kind, decode[policyv1.PodDisruptionBudget](t, doc).Spec.Selector.MatchLabels)
			case "NetworkPolicy":
				n := decode[networkingv1.NetworkPolicy](t, doc)
				fits(kind, n.Spec.PodSelector.MatchLabels)
				for _, rule := range n.Spec.Ingress {
					for _, np := range rule.Ports {
						if np.Port.Type == intstr.String {
							port(kind, np.Port.StrVal)
						}
					}
				}
			case "ServiceMonitor", "PodMonitor":
				m := decode[struct {
					metav1.TypeMeta   `json:",inline"`
					metav1.ObjectMeta `json:"metadata"`
					Spec              struct {
						Selector          metav1.LabelSelector
						NamespaceSelector object
						Endpoints         []object
						Endpoint          []object `json:"podMetricsEndpoints"`
					}
				}](t, doc)
				for _, e := range slices.Concat(m.Spec.Endpoints, m.Spec.Endpoint) {
					port(kind, e["port"].(string))
				}
				if kind == "ServiceMonitor" {
					monitors = append(monitors, m.Spec.Selector.MatchLabels)
				} else if p.ServiceAccountName != "" { // a sidecar's pod is another's
					fits(kind, m.Spec.Selector.MatchLabels)
				}
			}
		}
		for _, s := range monitors {
			if !labels.SelectorFromSet(s).Matches(labels.Set(headless)) {
				t.Errorf("ServiceMonitor: selector %v does not fit the headless Service's labels %v", s, headless)
			}
		}
	})
}
