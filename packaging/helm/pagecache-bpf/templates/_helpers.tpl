{{- define "pagecache-bpf.selector" -}}
app.kubernetes.io/name: pagecache-bpf
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "pagecache-bpf.labels" -}}
{{ include "pagecache-bpf.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "pagecache-bpf.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
