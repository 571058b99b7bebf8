{{- define "gatehouse.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 53 | trimSuffix "-" -}}
{{- end -}}

{{/* The name of all objects; suffixes have room below 63. */}}
{{- define "gatehouse.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "gatehouse.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "gatehouse.selectorLabels" -}}
app.kubernetes.io/name: {{ include "gatehouse.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "gatehouse.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "gatehouse.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "gatehouse.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "gatehouse.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "gatehouse.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ default $.Chart.AppVersion .tag }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* The port of a listener, or "" for a socket, one on loopback and one that is off. The argument is host:port. */}}
{{- define "gatehouse.port" -}}
{{- if and . (not (hasPrefix "unix:" .)) (not (regexMatch "^(127\\.|localhost:|\\[::1\\])" .)) -}}
{{- regexFind "[0-9]+$" . -}}
{{- end -}}
{{- end -}}

{{- define "gatehouse.grpcPort" -}}{{ include "gatehouse.port" (dig "grpc" "listen" "127.0.0.1:9191" .Values.config) }}{{- end -}}
{{- define "gatehouse.httpPort" -}}{{ include "gatehouse.port" (dig "http" "listen" "127.0.0.1:8181" .Values.config) }}{{- end -}}
{{- define "gatehouse.adminPort" -}}{{ include "gatehouse.port" (dig "admin" "listen" "127.0.0.1:8282" .Values.config) }}{{- end -}}

{{/* A duration such as 1m30s or 500ms in whole seconds, rounded up. */}}
{{- define "gatehouse.seconds" -}}
{{- $ms := 0 -}}
{{- range regexFindAll "[0-9]+(ms|h|m|s)" (toString .) -1 -}}
{{- $n := regexFind "^[0-9]+" . | int64 -}}
{{- $unit := regexFind "[a-z]+$" . -}}
{{- $ms = add $ms (mul $n (get (dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000) $unit)) -}}
{{- end -}}
{{- div (add $ms 999) 1000 -}}
{{- end -}}

{{- define "gatehouse.grace" -}}
{{- if .Values.terminationGracePeriodSeconds -}}
{{- .Values.terminationGracePeriodSeconds | int64 -}}
{{- else -}}
{{- add 5 (include "gatehouse.seconds" (dig "drain" "delay" "2s" .Values.config) | int64) (include "gatehouse.seconds" (dig "drain" "timeout" "10s" .Values.config) | int64) -}}
{{- end -}}
{{- end -}}

{{- define "gatehouse.overridesName" -}}
{{- if .Values.overridesConfigMap -}}{{ .Values.overridesConfigMap }}
{{- else if .Values.overrides -}}{{ include "gatehouse.fullname" . }}-overrides
{{- end -}}
{{- end -}}

{{/* gatehouse.yaml. */}}
{{- define "gatehouse.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- if .Values.persistence.enabled -}}
{{- $persist := default dict (get $config "persist") -}}
{{- $_ := set $persist "directory" .Values.persistence.mountPath -}}
{{- $_ := set $config "persist" $persist -}}
{{- end -}}
{{- if include "gatehouse.overridesName" . -}}
{{- $_ := set $config "overrides_dir" "/etc/gatehouse/overrides" -}}
{{- end -}}
{{- if not (get $config "opa") -}}
{{- $_ := unset $config "opa" -}}
{{- with .Values.bundlesURL -}}
{{- $_ := set $config "opa" (dict "services" (dict "bundles" (dict "url" .)) "bundles" (dict "policy" (dict "service" "bundles" "resource" "{{ .tenant }}.tar.gz"))) -}}
{{- end -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{- define "gatehouse.probe" -}}
{{- $root := .root -}}
{{- if eq $root.Values.probes.type "grpc" -}}
{{- if not (include "gatehouse.grpcPort" $root) -}}{{ fail "probes.type grpc needs a port: config.grpc.listen is a socket or on loopback" }}{{- end -}}
{{- if dig "grpc" "tls" "cert" "" $root.Values.config -}}{{ fail "probes.type grpc: kubelet does not speak TLS, and config.grpc.tls is set" }}{{- end -}}
{{- if eq .what "ready" }}
grpc:
  port: {{ include "gatehouse.grpcPort" $root }}
  service: envoy.service.auth.v3.Authorization
{{- else }}
{{- /* The health service says whether the server is ready, and a restart would not make it so. */}}
tcpSocket:
  port: grpc
{{- end }}
{{- else -}}
{{- if not (include "gatehouse.adminPort" $root) -}}{{ fail "probes.type http needs config.admin.listen on an address that kubelet reaches, such as :8282; or take grpc" }}{{- end -}}
{{- if dig "admin" "tls" "client_ca" "" $root.Values.config -}}{{ fail "probes.type http: kubelet shows no certificate, and config.admin.tls.client_ca asks for one; take grpc" }}{{- end -}}
httpGet:
  path: {{ if eq .what "ready" }}/readyz{{ else }}/healthz{{ end }}
  port: admin
  {{- if dig "admin" "tls" "cert" "" $root.Values.config }}
  scheme: HTTPS
  {{- end }}
{{- end }}
{{ toYaml .settings }}
{{- end -}}

{{/* The container, without restartPolicy. */}}
{{- define "gatehouse.container" -}}
name: gatehouse
image: {{ include "gatehouse.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args:
- serve
- -c=/etc/gatehouse/config/gatehouse.yaml
{{- with .Values.extraArgs }}
{{ toYaml . }}
{{- end }}
{{- with .Values.env }}
env:
{{ toYaml . }}
{{- end }}
{{- with .Values.envFrom }}
envFrom:
{{ toYaml . }}
{{- end }}
{{- $grpc := include "gatehouse.grpcPort" . }}
{{- $http := include "gatehouse.httpPort" . }}
{{- $admin := include "gatehouse.adminPort" . }}
{{- $host := and (eq .Values.mode "daemonset") (eq .Values.daemonset.reach "hostPort") }}
{{- if or $grpc $http $admin }}
ports:
{{- end }}
{{- if $grpc }}
- name: grpc
  containerPort: {{ $grpc }}
  {{- if $host }}
  hostPort: {{ $grpc }}
  {{- end }}
{{- end }}
{{- if $http }}
- name: http
  containerPort: {{ $http }}
  {{- if $host }}
  hostPort: {{ $http }}
  {{- end }}
{{- end }}
{{- if $admin }}
- name: admin
  containerPort: {{ $admin }}
{{- end }}
startupProbe:
  {{- include "gatehouse.probe" (dict "root" . "what" "live" "settings" .Values.probes.startup) | nindent 2 }}
readinessProbe:
  {{- include "gatehouse.probe" (dict "root" . "what" "ready" "settings" .Values.probes.readiness) | nindent 2 }}
livenessProbe:
  {{- include "gatehouse.probe" (dict "root" . "what" "live" "settings" .Values.probes.liveness) | nindent 2 }}
{{- with .Values.lifecycle }}
lifecycle:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- toYaml .Values.resources | nindent 2 }}
securityContext:
  {{- if eq .Values.mode "sidecar" }}
  {{- toYaml (merge (deepCopy .Values.securityContext) (omit .Values.podSecurityContext "fsGroup" "fsGroupChangePolicy" "supplementalGroups" "supplementalGroupsPolicy" "sysctls")) | nindent 2 }}
  {{- else }}
  {{- toYaml .Values.securityContext | nindent 2 }}
  {{- end }}
volumeMounts:
- name: gatehouse-config
  mountPath: /etc/gatehouse/config
  readOnly: true
{{- if include "gatehouse.overridesName" . }}
- name: gatehouse-overrides
  mountPath: /etc/gatehouse/overrides
  readOnly: true
{{- end }}
{{- if .Values.persistence.enabled }}
- name: gatehouse-bundles
  mountPath: {{ .Values.persistence.mountPath }}
{{- end }}
{{- if .Values.tls.secretName }}
- name: gatehouse-tls
  mountPath: {{ .Values.tls.mountPath }}
  readOnly: true
{{- end }}
{{- if and (eq .Values.mode "daemonset") (eq .Values.daemonset.reach "socket") }}
- name: gatehouse-socket
  mountPath: {{ .Values.daemonset.socket.mountPath }}
{{- else if eq .Values.mode "sidecar" }}
- name: gatehouse-socket
  mountPath: {{ .Values.sidecar.socketMountPath }}
{{- end }}
{{- with .Values.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "gatehouse.volumes" -}}
- name: gatehouse-config
  configMap: {name: {{ include "gatehouse.fullname" . }}}
{{- with include "gatehouse.overridesName" . }}
- name: gatehouse-overrides
  configMap: {name: {{ . }}}
{{- end }}
{{- if .Values.persistence.enabled }}
- name: gatehouse-bundles
  {{- default (dict "emptyDir" (dict "sizeLimit" "11Gi")) .Values.persistence.volume | toYaml | nindent 2 }}
{{- end }}
{{- with .Values.tls.secretName }}
- name: gatehouse-tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- if and (eq .Values.mode "daemonset") (eq .Values.daemonset.reach "socket") }}
- name: gatehouse-socket
  hostPath: {path: {{ .Values.daemonset.socket.hostPath }}, type: DirectoryOrCreate}
{{- else if eq .Values.mode "sidecar" }}
- name: gatehouse-socket
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
{{- end }}
{{- with .Values.volumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/*
The part of a pod that is Gatehouse as a native sidecar: initContainers and volumes, to be merged into a pod's spec. A chart
that has this one as a dependency calls it with the dependency's scope:

  {{- include "gatehouse.sidecar" .Subcharts.gatehouse | nindent 6 }}
*/}}
{{- define "gatehouse.sidecar" -}}
initContainers:
- {{- include "gatehouse.container" . | nindent 2 }}
  restartPolicy: Always
volumes:
{{ include "gatehouse.volumes" . }}
{{- end -}}

{{- define "gatehouse.pod" -}}
metadata:
  labels:
    {{- include "gatehouse.selectorLabels" . | nindent 4 }}
    app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
    {{- with merge (deepCopy .Values.podLabels) .Values.commonLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: gatehouse
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "gatehouse.serviceAccount" . }}
  automountServiceAccountToken: {{ .Values.serviceAccount.automountToken }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "gatehouse.grace" . }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  {{- $prepare := and (eq .Values.mode "daemonset") (eq .Values.daemonset.reach "socket") .Values.daemonset.socket.prepareImage }}
  {{- if or $prepare .Values.initContainers }}
  initContainers:
  {{- if $prepare }}
  - name: socket-folder
    image: {{ .Values.daemonset.socket.prepareImage }}
    command: [chown, "{{ .Values.podSecurityContext.runAsUser }}:{{ .Values.podSecurityContext.runAsGroup }}", {{ .Values.daemonset.socket.mountPath }}]
    resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {memory: 16Mi}}
    securityContext:
      runAsNonRoot: false
      runAsUser: 0
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities: {drop: [ALL], add: [CHOWN]}
    volumeMounts:
    - name: gatehouse-socket
      mountPath: {{ .Values.daemonset.socket.mountPath }}
  {{- end }}
  {{- with .Values.initContainers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- end }}
  containers:
  - {{- include "gatehouse.container" . | nindent 4 }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if eq .Values.mode "standalone" }}
  {{- with .Values.topologySpread }}
  topologySpreadConstraints:
  {{- range . }}
  - {{- toYaml . | nindent 4 }}
    labelSelector:
      matchLabels:
        {{- include "gatehouse.selectorLabels" $ | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
  {{- end }}
  {{- end }}
  volumes:
  {{- include "gatehouse.volumes" . | nindent 2 }}
{{- end -}}
